"""What training costs beside the network: the loop itself, and saving.

    python benchmarks/loop.py --write                       # DiT-B/2 at 32x32x4, batch 4, float32: minutes on 2 cores
    python benchmarks/loop.py --device cuda --batch 64      # bfloat16, compiled

Runs the training loop on made shards and takes apart the wall time of its steps: *inside* is the objective with its
network calls, the backward pass, the optimizer's step and the averages'; everything else is the loop, the gradient's
norm, the finite check and the data included. On a GPU each inner part is waited for, before and after: what would have
been hidden behind it counts as the loop's, so the share is an upper limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import device_name, print_rows, put_into_page, write_result
from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.distributed import World
from shortcutflow.ema import EMA
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives import ShortcutObjective
from shortcutflow.train import loop
from shortcutflow.train.checkpoint_writer import CheckpointWriter
from shortcutflow.train.metrics import MetricLogger
from shortcutflow.train.resume import Position
from shortcutflow.train.state import build_train_state, save

LATENT = (4, 32, 32)
CLASSES = 1000
LOG_EVERY = 50
"""Steps between two log lines unless a config says otherwise."""
WARM_UP = 3
"""Steps that are not timed: compilation, and the first touch of memory."""
PAGE = "docs/training.md"
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dit_b_2", help="name of the network")
    parser.add_argument("--options", type=json.loads, default={}, help="the network's options, as JSON")
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--steps", type=int, default=10, help="timed before a checkpoint, and as many after it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: in bfloat16 and compiled")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results and the table of {PAGE}")
    args = parser.parse_args()
    if args.steps < 4:
        raise SystemExit(f"--steps is {args.steps}: medians need at least 4")
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(args, Path(name))
    print(f"{args.backbone} on {device_name(device)}, torch {torch.__version__}")
    print_rows(rows)
    if args.write:
        config = {key: value for key, value in vars(args).items() if key != "write"}
        print(write_result("loop", device, config, rows))
        start, end = f"<!-- loop table, {device.type}: benchmarks/loop.py writes it -->", "<!-- end of loop table -->"
        put_into_page(start, table_of(rows), end, page=PAGE)


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Train on made shards; the loop's share of a step, and how long a checkpoint holds training up."""
    # One log line and one checkpoint among the timed steps, and both once more at the end, which is not timed.
    logged_at, saved_at, total = WARM_UP + args.steps - 1, WARM_UP + args.steps, WARM_UP + 2 * args.steps + 1
    config = made_run(
        folder / "shards", BackboneConfig(name=args.backbone, options=args.options), steps=total,
        checkpoint_every=saved_at, log_every=logged_at, global_batch_size=args.batch, device=args.device,
        keep_checkpoints=1, **({"precision": "bfloat16", "compile": True} if args.device == "cuda" else {}),
    )  # fmt: skip
    watched = Watched(torch.device(args.device))
    with watched.watching(config):
        loop.train(config, folder / "run")
    whole, outside = watched.seconds()
    plain, around = range(WARM_UP + 1, logged_at), [whole[done] for done in range(saved_at, total)]
    usual = statistics.median(whole[done] for done in plain)
    own = statistics.median(outside[done] for done in plain)
    line = max(0.0, outside[logged_at] - own)
    stall = max(around) - usual
    here = synchronous_seconds(config, folder / "synchronous")
    return [
        {"name": "a step", "ms": 1000 * usual, "loop_ms": 1000 * own, "loop_percent": 100 * own / usual},
        {
            "name": f"with a log line every {LOG_EVERY} steps", "log_line_ms": 1000 * line,
            "loop_percent": 100 * (own + line / LOG_EVERY) / (usual + line / LOG_EVERY),
        },
        {
            "name": "a checkpoint", "stall_ms": 1000 * stall, "stall_in_steps": stall / usual,
            "all_steps_until_written_ms": 1000 * (sum(around) - len(around) * usual), "synchronous_ms": 1000 * here,
            "spread_of_steps_ms": 1000 * (max(whole[done] for done in plain) - min(whole[done] for done in plain)),
        },
    ]  # fmt: skip


def made_run(shards: Path, backbone: BackboneConfig, **training: Any) -> RunConfig:
    """A run on latents made of random numbers."""
    rng = np.random.default_rng(0)
    made = (Sample(rng.normal(size=LATENT).astype(np.float32), i % CLASSES, f"made{i:04d}") for i in range(512))
    write_shards(made, shards, samples_per_shard=256, num_classes=CLASSES, preprocessing="random numbers")
    return RunConfig(
        name="loop", data=ShardsData(folder=shards), backbone=backbone,
        objective=ShortcutObjective(condition_dropout=0.1), training=TrainingConfig(**training),
    )  # fmt: skip


class Watched:
    """Wall seconds of each step of a training run, and of what lies inside its objective, backward pass and updates.

    Args:
        device: of the run; waited for before and after each inner part.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._starts: list[float] = []
        self._inside: list[float] = []

    @contextmanager
    def watching(self, config: RunConfig) -> Iterator[None]:
        """Time the run that is made in here."""
        begin, observe = MetricLogger.start_step, self._start_step

        def start_step(metrics: MetricLogger) -> None:
            observe()
            begin(metrics)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(MetricLogger, "start_step", start_step))
            objective = (type(config.objective), "__call__")
            for owner, name in (objective, (Tensor, "backward"), (torch.optim.AdamW, "step"), (EMA, "update")):
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
            # Sample grids cost what the sampler costs, as often as one likes.
            stack.enter_context(mock.patch.object(loop, "shows_grid", return_value=False))
            yield

    def seconds(self) -> tuple[dict[int, float], dict[int, float]]:
        """Whole and outside seconds of each step but the last, by the number of steps done with it."""
        whole = {done: self._starts[done] - self._starts[done - 1] for done in range(1, len(self._starts))}
        return whole, {done: seconds - self._inside[done - 1] for done, seconds in whole.items()}

    def _start_step(self) -> None:
        self._starts.append(time.perf_counter())
        self._inside.append(0.0)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            start = time.perf_counter()
            result = run(*args, **kwargs)
            self._wait()
            if self._inside:
                self._inside[-1] += time.perf_counter() - start
            return result

        return timed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def synchronous_seconds(config: RunConfig, folder: Path) -> float:
    """How long a save of the same state takes that training waits for to its end."""
    world = World(0, 1, torch.device(config.training.device))
    state = build_train_state(config, world)
    for parameter in state.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # makes AdamW's moments
    with CheckpointWriter(folder, keep=config.training.keep_checkpoints) as writer:
        start = time.perf_counter()
        save(config, state, writer, Position(), 1, 0)
        writer.wait()
        return time.perf_counter() - start


def table_of(rows: list[Row]) -> str:
    """As Markdown."""
    a, b, c = rows
    return "\n".join(
        [
            "| | |",
            "| --- | ---: |",
            f"| a step | {a['ms']:,.0f} ms |",
            f"| of it the loop | {a['loop_ms']:.1f} ms, {a['loop_percent']:.2f}% |",
            f"| a log line more | {b['log_line_ms']:.1f} ms |",
            f"| the loop with a log line every {LOG_EVERY} steps | {b['loop_percent']:.2f}% |",
            f"| longest step around a checkpoint, beyond a usual one | {c['stall_ms']:,.0f} ms, "
            f"{c['stall_in_steps']:.2f} steps |",
            f"| all steps until it was written, beyond usual ones | {c['all_steps_until_written_ms']:,.0f} ms |",
            f"| the same checkpoint, waited for | {c['synchronous_ms']:,.0f} ms |",
        ]
    )


if __name__ == "__main__":
    main()
