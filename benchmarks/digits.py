"""Quality of the digits recipe by number of steps, over three seeds, beside the paper's model and plain flow matching.

    python benchmarks/digits.py            # nine runs of the recipe; prints the README's table
    python benchmarks/digits.py --write    # and writes it into README.md and benchmarks/results/

A run is `recipes/digits.py` with its own settings but the seed; the paper's model is its recipe ``digits_paper``, and
flow matching is that one with another objective. All have 2,500 steps, of which flow matching's cost 6/7.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.recipe_run import ROOT, run_recipe
from benchmarks.record import put_into_readme, write_result
from recipes.digits import recipe
from shortcutflow.data.digits import load_digits
from shortcutflow.evaluation.distances.frechet import frechet_distance
from shortcutflow.evaluation.features.digits import digit_classifier

START, END = "<!-- digits table: benchmarks/digits.py writes it -->", "<!-- end of digits table -->"


ROWS: dict[str, tuple[str, ...]] = {
    "shortcut": ("digits",),
    "as in the paper": ("digits_paper",),
    "flow matching": ("digits_paper", "--objective", "flow_matching"),
}
"""By name, a recipe and its options."""


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run: its seconds of training and its evaluation's rows."""
    recipe_name, *options = ROWS[name]
    trained = run_recipe(recipe_name, folder / f"{name}-{seed}", [f"seed={seed}", *options])
    extra = {"classifier_held_out_accuracy": digit_classifier()[1], "real_against_real": real_against_real()}
    return {"name": name, "seed": seed, "seconds": trained.seconds, **extra, "rows": trained.rows}


def real_against_real(count: int = 256) -> float:
    """The pixel distance of some real digits to the rest: what no sampler needs to beat."""
    images = load_digits()[0].reshape(1797, -1)
    order = np.random.default_rng(0).permutation(len(images))
    return frechet_distance(images[order[:count]], images[order[count:]])


def markdown_table(result: dict[str, Any]) -> str:
    """The mean and the range over all seeds, as Markdown."""
    runs = {name: [run for run in result["rows"] if run["name"] == name] for name in ROWS}
    titles = ["steps", *(title for name in runs for title in (f"{name}: distance", "read"))]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---:'] * len(titles))} |"]
    for i, first in enumerate(runs["shortcut"][0]["rows"]):
        cells = [str(first["steps"])]
        for of_kind in runs.values():
            distances, shares = ([run["rows"][i][key] for run in of_kind] for key in ("fid", "label_accuracy"))
            cells.append(f"{statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f})")
            cells.append(f"{statistics.mean(shares):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--write", action="store_true", help="write README.md and benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(measure, name, seed, Path(folder)) for name in ROWS for seed in args.seeds]
            rows = [run.result() for run in runs]
        if args.write:
            shutil.copy(
                Path(folder) / f"shortcut-{args.seeds[0]}" / "samples.png", ROOT / "docs" / "digits_samples.png"
            )
    table = markdown_table({"rows": rows})
    print(table)
    if args.write:
        print(write_result("digits", torch.device("cpu"), recipe().model_dump(mode="json"), rows))
        put_into_readme(START, table, END)


if __name__ == "__main__":
    main()
