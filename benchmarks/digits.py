"""Quality of the digits recipe by number of steps, over three seeds, beside the paper's model and plain flow matching.

    python benchmarks/digits.py            # nine runs of the recipe; prints the table
    python benchmarks/digits.py --write    # and writes it into docs/measured.md, its distances into README.md,
                                           # the pictures of both and benchmarks/results/

A run is `recipes/digits.py` with its own settings but the seed; the paper's model is its recipe ``digits_paper``, and
flow matching is that one with another objective. All have 2,500 steps, of which flow matching's cost 6/7.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.recipe_run import ROOT, run_recipe
from benchmarks.record import MEASURED, put_into_page, write_result
from recipes.digits import recipe
from shortcutflow.data.digits import load_digits
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.evaluation.distances.frechet import frechet_distance
from shortcutflow.evaluation.features.digits import digit_classifier
from shortcutflow.evaluation.generate import generate, initial_noise
from shortcutflow.evaluation.sample_grid import image_grid, n_steps
from shortcutflow.models.model import load

START, END = "<!-- digits table: benchmarks/digits.py writes it -->", "<!-- end of digits table -->"
SHORT_START = "<!-- short digits table: benchmarks/digits.py writes it -->"
SHORT_END = "<!-- end of short digits table -->"
ANIMATED = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of steps, a frame each."""

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


def markdown_table(result: dict[str, Any], *, distances_only: bool = False) -> str:
    """The mean and the range over all seeds, as Markdown."""
    runs = {name: [run for run in result["rows"] if run["name"] == name] for name in ROWS}
    of_each = ["{name}"] if distances_only else ["{name}: distance", "read"]
    titles = ["steps", *(title.format(name=name) for name in runs for title in of_each)]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---:'] * len(titles))} |"]
    for i, first in enumerate(runs["shortcut"][0]["rows"]):
        cells = [str(first["steps"])]
        for of_kind in runs.values():
            distances, shares = ([run["rows"][i][key] for run in of_kind] for key in ("fid", "label_accuracy"))
            cells.append(f"{statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f})")
            cells += [] if distances_only else [f"{statistics.mean(shares):.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_animation(runs: Mapping[str, Path], path: Path) -> None:
    """A GIF of several runs' samples from the same noise in 1, 2, 4 ... 128 steps, two rows of all digits a run."""
    models = {name: load(folder, device=torch.device("cpu")) for name, folder in runs.items()}
    titles = [title for name in models for title in (name, "")]
    frames = []
    for steps in ANIMATED:
        rows: list[Tensor] = []
        for model in models.values():
            noise, y = initial_noise(model, count=20, seed=0)
            (images,) = ImageDecoder(model.info, model.device)(generate(model, noise, y, steps=steps, seed=0))
            rows += images.chunk(2)
        grid = image_grid(rows, titles, title=n_steps(steps), group=2, cell=40)
        frames.append(Image.fromarray(grid).quantize(64))
    # The first and the last stay longer.
    milliseconds = [2000, *(900 for _ in ANIMATED[2:]), 2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--write", action="store_true", help="write both pages, pictures and benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(measure, name, seed, Path(folder)) for name in ROWS for seed in args.seeds]
            rows = [run.result() for run in runs]
        if args.write:
            drawn = {name: Path(folder) / f"{name}-{args.seeds[0]}" for name in ("shortcut", "flow matching")}
            draw_animation(drawn, ROOT / "docs" / "digits_steps.gif")
            shutil.copy(drawn["shortcut"] / "samples.png", ROOT / "docs" / "digits_samples.png")
    table = markdown_table({"rows": rows})
    print(table)
    if args.write:
        print(write_result("digits", torch.device("cpu"), recipe().model_dump(mode="json"), rows))
        put_into_page(START, table, END, MEASURED)
        put_into_page(SHORT_START, markdown_table({"rows": rows}, distances_only=True), SHORT_END, "README.md")


if __name__ == "__main__":
    main()
