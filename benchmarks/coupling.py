"""What the optimal transport between noise and data costs, beside a training step.

    python benchmarks/coupling.py --write                   # with nothing else running

The step is the digits' network's on a batch of 64; those of other sizes have larger networks. Training does not wait
for the assignment, which a thread makes: the share says how much of a core it takes beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import device_name, print_rows, put_into_page, seconds_in_turn, write_result
from benchmarks.train_step import digits_step
from shortcutflow.coupling import couple

SHAPES = {"8x8x1": (1, 8, 8), "16x16x3": (3, 16, 16), "32x32x4": (4, 32, 32)}
POOLS = ((1792, 10), (1792, 1), (4096, 1))
"""Samples, and classes that they are of."""
CPU = torch.device("cpu")
PAGE = "docs/training.md"


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each; their median counts")
    parser.add_argument("--divide", type=int, default=1, help="pools smaller by this factor, to try the command")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results and the table of {PAGE}")
    args = parser.parse_args()
    rows = [row for name in SHAPES for row in measure(name, args.rounds, args.divide)]
    print(f"{device_name(CPU)}, torch {torch.__version__}")
    print_rows(rows)
    if args.write:
        print(write_result("coupling", CPU, {"rounds": args.rounds, "divide": args.divide}, rows))
        put_into_page(
            "<!-- coupling table: benchmarks/coupling.py writes it -->", table_of(rows),
            "<!-- end of coupling table -->", page=PAGE,
        )  # fmt: skip


def measure(name: str, rounds: int, divide: int) -> list[dict[str, Any]]:
    """Milliseconds a sample of each pool's assignment, and as a share of a training step's."""
    generator = torch.Generator().manual_seed(0)
    step = digits_step(compiled=False) if name == "8x8x1" else None
    runs: dict[str, Any] = {} if step is None else {"step": step}
    for pool, classes in POOLS:
        noise, data = torch.randn(2, pool // divide, *SHAPES[name], generator=generator)
        y = torch.randint(classes, (pool // divide,), generator=generator)
        runs[f"{pool}/{classes}"] = lambda noise=noise, data=data, y=y: couple(noise, data, y)
    seconds = {each: statistics.median(times) for each, times in seconds_in_turn(runs, rounds, CPU, 1).items()}
    rows = []
    for pool, classes in POOLS:
        ms = 1000 * seconds[f"{pool}/{classes}"] / (pool // divide)
        share = None if step is None else 100 * ms / (1000 * seconds["step"] / len(step.data))
        rows.append({"name": name, "pool": pool, "classes": classes, "ms_per_sample": ms, "percent_of_step": share})
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows for a page."""
    lines = ["| samples of | pool | classes | ms a sample | of a step |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        share = "" if row["percent_of_step"] is None else f"{row['percent_of_step']:.1f}%"
        lines.append(f"| {row['name']} | {row['pool']:,} | {row['classes']} | {row['ms_per_sample']:.3f} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
