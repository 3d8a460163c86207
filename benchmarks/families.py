"""Every family of backbones on one task, at equal training FLOPs.

    python benchmarks/families.py                  # times, then three runs of each family; prints the table
    python benchmarks/families.py --jobs 2         # two runs side by side; the times are taken before
    python benchmarks/families.py --write          # and writes docs/measured.md and benchmarks/results/

(Not called backbones.py: beside the other benchmarks it would hide the package of that name from them.)

A run is the recipe ``digits_paper`` with another backbone, of about the DiT's size, for as many steps as cost what the
DiT's 2,500 steps cost. Milliseconds are medians of rounds in which the families take turns: forward of a batch of 64,
and a training step (targets, forward, backward, gradient norm, AdamW, average).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

import backbones
import shortcutflow as sf
from benchmarks.recipe_run import run_recipe
from benchmarks.record import MEASURED, put_into_page, write_result
from benchmarks.train_step import Step, seconds_of
from recipes.digits import paper_recipe as recipe
from shortcutflow.optim import OptimizerConfig

START, END = "<!-- families table: benchmarks/families.py writes it -->", "<!-- end of families table -->"
BUDGETS = (1, 128)

DIGITS_SIZED: dict[str, dict[str, Any]] = {
    "dit": {"width": 64, "depth": 4, "heads": 4, "patch": 2},
    "transformer": {"width": 64, "depth": 4, "heads": 4, "patch": 2},
    "lstm": {"width": 64, "depth": 4, "patch": 2},
    "mamba": {"width": 48, "depth": 4, "patch": 2},
    "unet": {"width": 16, "multipliers": [1, 2], "stages": 1, "attention_levels": [1], "head_width": 16},
}
"""A network of each family for 8x8 images, near the recipe's DiT in size."""


def build(family: str) -> Any:
    torch.manual_seed(0)
    return backbones.create(family, shape=(1, 8, 8), num_classes=10, **DIGITS_SIZED[family])


def steps_of(family: str) -> int:
    """Steps that cost what the recipe's cost."""
    return round(recipe().training.steps * build("dit").flops() / build(family).flops())


def time_families(families: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward pass and of a training step, batch 64, the families in turn."""
    generator = torch.Generator().manual_seed(0)
    data, y = torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 10
    t = d = torch.full((64,), 0.5)
    options: dict[str, Any] = {"null_y": 10, "average": sf.EMAConfig(), "optimizer": OptimizerConfig()}
    options |= {"compiled": False, "bfloat16": False}
    objective = sf.ShortcutObjective(condition_dropout=0.1)
    steps = {family: Step(build(family), objective, data, y, **options) for family in families}
    forward: dict[str, list[float]] = {family: [] for family in families}
    training: dict[str, list[float]] = {family: [] for family in families}
    for _ in range(rounds):
        for family, step in steps.items():
            training[family] += seconds_of(step, 20, warm_up=5)
            with torch.no_grad():
                for _ in range(20):
                    start = time.perf_counter()
                    step.net(data, t, d, y)
                    forward[family].append(time.perf_counter() - start)
    in_ms = {"ms_forward": forward, "ms_step": training}
    return {
        family: {name: 1000 * statistics.median(seconds[family]) for name, seconds in in_ms.items()}
        for family in families
    }


def train(family: str, seed: int, folder: Path, threads: int) -> dict[str, Any]:
    """One run of the recipe with this family; its seconds of training and its quality by budget."""
    overrides = [
        f"seed={seed}", f"backbone.name={family}", f"backbone.options={json.dumps(DIGITS_SIZED[family])}",
        f"training.steps={steps_of(family)}", f"evaluation.steps={list(BUDGETS)}",
    ]  # fmt: skip
    trained = run_recipe("digits_paper", folder / f"{family}-{seed}", overrides, threads=threads)
    quality = {str(row["steps"]): row for row in trained.rows}
    told = ", ".join(f"{n} steps: {row['fid']:.2f}" for n, row in quality.items())
    print(f"{family}, seed {seed}: {told}", flush=True)
    return {"seed": seed, "training_seconds": trained.seconds, "quality": quality}


def markdown_table(result: dict[str, Any]) -> str:
    """A row a family: size, times, and for each budget the mean and range over seeds."""
    titles = ["backbone", "parameters", "MFLOP", "ms forward", "ms step", "training steps"]
    titles += [title for n in BUDGETS for title in (f"{n} step{'s' * (n > 1)}: distance", "read")]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for row in result["rows"]:
        cells = [
            f"`{row['family']}`", f"{row['parameters'] / 1e6:.2f} M", f"{row['flops'] / 1e6:.1f}",
            f"{row['ms_forward']:.1f}", f"{row['ms_step']:.1f}", f"{row['training_steps']:,}",
        ]  # fmt: skip
        for budget in BUDGETS:
            of_runs = [run["quality"][str(budget)] for run in row["runs"]]
            distances, shares = ([quality[key] for quality in of_runs] for key in ("fid", "label_accuracy"))
            cells.append(f"{statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f})")
            cells.append(f"{statistics.mean(shares):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(DIGITS_SIZED), default=list(DIGITS_SIZED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--jobs", type=int, default=1, help="training runs side by side")
    parser.add_argument("--write", action="store_true", help="write docs/measured.md and benchmarks/results/")
    args = parser.parse_args()
    times = time_families(args.families, args.rounds)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            family: [pool.submit(train, family, seed, Path(folder), threads) for seed in args.seeds]
            for family in args.families
        }
        rows = []
        for family in args.families:
            net = build(family)
            size = {"parameters": sum(p.numel() for p in net.parameters()), "flops": net.flops()}
            done = [run.result() for run in runs[family]]
            rows.append(
                {"family": family, "options": DIGITS_SIZED[family]} | size | times[family]
                | {"training_steps": steps_of(family), "runs": done}
            )  # fmt: skip
    table = markdown_table({"rows": rows})
    print(table)
    if args.write:
        print(write_result("families", torch.device("cpu"), recipe().model_dump(mode="json"), rows))
        put_into_page(START, table, END, MEASURED)


if __name__ == "__main__":
    main()
