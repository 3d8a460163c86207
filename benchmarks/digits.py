"""Quality of the digits recipe by sampling budget, over three seeds, beside plain flow matching.

    python benchmarks/digits.py            # six runs of the recipe; prints the README's table
    python benchmarks/digits.py --write    # and writes it into README.md and benchmarks/results/

A run is `recipes/digits.py` with its own settings but the seed and the objective.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
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


def measure(objective: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run of the recipe: its seconds of training and its evaluation's rows."""
    trained = run_recipe("digits", folder / f"{objective}-{seed}", [f"seed={seed}", "--objective", objective])
    extra = {"classifier_held_out_accuracy": digit_classifier()[1], "real_against_real": real_against_real()}
    return {"objective": objective, "seed": seed, "seconds": trained.seconds, **extra, "rows": trained.rows}


def real_against_real(count: int = 256) -> float:
    """The pixel distance of some real digits to the rest: what no sampler needs to beat."""
    images = load_digits()[0].reshape(1797, -1)
    order = np.random.default_rng(0).permutation(len(images))
    return frechet_distance(images[order[:count]], images[order[count:]])


def markdown_table(result: dict[str, Any]) -> str:
    """Seed 0 and the range over all seeds, for both objectives, as Markdown."""
    lines = [
        "| steps | shortcut: distance | read correctly | flow matching: distance | read correctly |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    runs: dict[str, list[dict[str, Any]]] = {"shortcut": [], "flow_matching": []}
    for run in result["rows"]:
        runs[run["objective"]].append(run)
    for i, first in enumerate(runs["shortcut"][0]["rows"]):
        cells = [str(first["steps"])]
        for of_kind in runs.values():
            distances, shares = ([run["rows"][i][key] for run in of_kind] for key in ("fid", "label_accuracy"))
            cells.append(f"{distances[0]:.2f} ({min(distances):.2f} to {max(distances):.2f})")
            cells.append(f"{shares[0]:.1%} ({min(shares):.1%} to {max(shares):.1%})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="write README.md and benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(kind, seed, Path(folder)) for kind in ("shortcut", "flow_matching") for seed in args.seeds]
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
