"""A shortcut model from a trained flow against one from scratch, at equal compute: digits, three seeds.

    python benchmarks/finetune.py --jobs 2            # prints the table of docs/checkpoints.md
    python benchmarks/finetune.py --jobs 2 --write    # and writes it there and into benchmarks/results/

The flow is the recipe ``digits_paper`` with ``objective.kind=flow_matching``, 2,500 steps, which are not counted: the
question is what to do with a flow that is there. Each of the others gets the compute of so many steps of the recipe
(forward and backward passes, and targets; benchmarks/compute.py), a schedule of its own, and the same random numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.compute import evaluations_a_step
from benchmarks.recipe_run import run_recipe
from benchmarks.record import put_into_page, write_result
from recipes.digits import paper_recipe as recipe
from shortcutflow.config import with_overrides

START, END = "<!-- fine-tuning table: benchmarks/finetune.py writes it -->", "<!-- end of fine-tuning table -->"
PAGE = "docs/checkpoints.md"
LENGTHS = (625, 2500)
BUDGETS = (1, 4, 128)
WAYS: dict[str, tuple[str, ...]] = {
    "from scratch": (),
    "from the flow": ("start=FLOW",),
    "from the flow, staged": ("start=FLOW", "objective.bootstrap_from=0.1"),
    "from the flow, which also teaches": ("start=FLOW", "teacher=FLOW", "objective.flow_of=teacher"),
}
"""Overrides of the recipe; FLOW stands for the flow's folder."""


def overrides_of(way: str, length: int, seed: int, flow: Path) -> list[str]:
    """What turns the recipe into this run: the last one says how many steps cost what ``length`` of the recipe's do."""
    chosen = [f"evaluation.steps={list(BUDGETS)}", f"seed={seed}"]
    chosen += [override.replace("FLOW", str(flow)) for override in WAYS[way]]
    steps = round(length * evaluations_a_step(recipe()) / evaluations_a_step(with_overrides(recipe(), chosen)))
    return [*chosen, f"training.steps={steps}"]


def measure(way: str, length: int, seed: int, folder: Path, threads: int) -> dict[str, Any]:
    """One run from the seed's flow, or from scratch."""
    overrides = overrides_of(way, length, seed, folder / f"flow-{seed}")
    name = f"{way.replace(' ', '-').replace(',', '')}-{length}-{seed}"
    trained = run_recipe("digits_paper", folder / name, overrides, threads=threads)
    quality = {str(row["steps"]): row for row in trained.rows}
    print(f"{way}, {length} steps' compute, seed {seed}: one step {quality['1']['fid']:.2f}", flush=True)
    steps = int(overrides[-1].partition("=")[2])
    return {"seed": seed, "steps": steps, "training_seconds": trained.seconds, "quality": quality}


def train_flow(seed: int, folder: Path, threads: int) -> None:
    """The flow that all fine-tuned runs of a seed begin with."""
    run_recipe(
        "digits_paper", folder / f"flow-{seed}", [f"seed={seed}", "--objective", "flow_matching"], threads=threads
    )


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A row a way and a length: mean and range over seeds at each budget."""
    titles = ["shortcut model", "compute of", "seconds", *(f"{n} step{'s' * (n > 1)}" for n in BUDGETS), "read, 1 step"]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for row in rows:
        seconds = statistics.mean(run["training_seconds"] for run in row["runs"])
        cells = [row["way"], f"{row['length']:,} steps", f"{seconds:.0f}"]
        for budget in BUDGETS:
            distances = [run["quality"][str(budget)]["fid"] for run in row["runs"]]
            cells.append(f"{statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f})")
        cells.append(f"{statistics.mean(run['quality']['1']['label_accuracy'] for run in row['runs']):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--folder", type=Path, help="where runs are kept. [default: a temporary one]")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and benchmarks/results/")
    args = parser.parse_args()
    threads = max(1, torch.get_num_threads() // args.jobs)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folder = (args.folder or Path(temporary)).absolute()
        list(pool.map(lambda seed: train_flow(seed, folder, threads), args.seeds))
        wanted = [(way, length) for length in LENGTHS for way in WAYS]
        runs = [
            [pool.submit(measure, way, length, seed, folder, threads) for seed in args.seeds] for way, length in wanted
        ]
        rows = [
            {"way": way, "length": length, "runs": [run.result() for run in of_row]}
            for (way, length), of_row in zip(wanted, runs, strict=True)
        ]
    table = markdown_table(rows)
    print(f"\n{table}")
    if args.write:
        config = {"jobs": args.jobs, "ways": WAYS} | recipe().model_dump(mode="json")
        print(write_result("finetune", torch.device("cpu"), config, rows))
        put_into_page(START, table, END, PAGE)


if __name__ == "__main__":
    main()
