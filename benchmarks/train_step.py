"""How long one training step takes.

    python benchmarks/train_step.py digits                  # the digits network, against the released code's seconds
    python benchmarks/train_step.py digits --reference-command 'COMMAND'    # the same, side by side in one run
    python benchmarks/train_step.py dit --write             # DiT-B/2, 32x32x4, batch 256, bfloat16, compiled (a GPU)

A step is: draw, targets (two half steps by the average), forward, backward, gradient norm, AdamW, average. COMMAND
times another implementation's step at the same settings and prints, as its last line, JSON with "ms_median".
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

import backbones
import shortcutflow as sf
from benchmarks.compute import FORWARD_AND_BACKWARD
from benchmarks.record import device_name, print_rows, write_result
from shortcutflow.optim import OptimizerConfig, build_optimizer
from shortcutflow.seeds import generator_for
from shortcutflow.train.metrics import peak_flops
from shortcutflow.train.parallel import compile_options
from shortcutflow.train.step import clip_gradients

RECORDED_MS = 84.0
"""The released code at the settings of digits_reference: 84 to 87 ms on two quiet CPU cores, float32, compiled."""


class Step:
    """One training step of a network under an objective, as the training loop makes it."""

    def __init__(
        self, net: nn.Module, objective: sf.Objective, data: torch.Tensor, y: torch.Tensor, *, null_y: int,
        average: sf.EMAConfig, optimizer: OptimizerConfig, compiled: bool, bfloat16: bool,
    ) -> None:  # fmt: skip
        self.net, self.objective, self.data, self.y, self.null_y = net, objective, data, y, null_y
        self.average = sf.EMA(net, average)
        self.optimizer = build_optimizer(net.parameters(), optimizer)
        self.call, self.target_call = net, self.average.network
        if compiled:
            self.objective = objective.compiled(dynamic=False, **compile_options(data.device))
        self.bfloat16 = bfloat16
        self.done = 0

    def __call__(self) -> None:
        device = self.data.device
        draws = generator_for(0, "objective", step=self.done, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            report = self.objective(
                self.call, self.data, self.y, target_net=self.target_call, null_y=self.null_y, generator=draws
            )
        report.loss.backward()
        norm = clip_gradients(self.optimizer, None)
        if not torch.stack([report.loss.detach(), norm]).isfinite().all():
            raise RuntimeError("the benchmark's loss is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.net, self.done)
        self.done += 1


def seconds_of(step: Step, count: int, warm_up: int) -> list[float]:
    """Wall seconds of each of ``count`` steps; the loss is read in each, so the device is waited for."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        if step.data.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def digits_step(compiled: bool) -> Step:
    """The settings of tests/golden/digits_reference.npz: the released network, objective and optimizer."""
    net = backbones.create("dit", shape=(1, 8, 8), num_classes=1, width=64, depth=4, heads=4, released=True)
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(64, 1, 8, 8, generator=generator) * 2 - 1
    return Step(
        net, sf.ShortcutObjective.released(class_dropout_prob=1.0), data, torch.ones(64, dtype=torch.int64), null_y=1,
        average=sf.EMAConfig(warm_up=False), optimizer=OptimizerConfig(lr=1e-3), compiled=compiled, bfloat16=False,
    )  # fmt: skip


def digits(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Eager (and compiled) steps against the released code's: recorded, or run in turn with ours."""
    steps = {"ours, eager": digits_step(compiled=False)}
    if args.compile:
        steps["ours, compiled"] = digits_step(compiled=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    reference: list[float] = []
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name] += seconds_of(step, args.steps, warm_up=20)
        if args.reference_command:
            out = subprocess.run(shlex.split(args.reference_command), capture_output=True, text=True, check=True).stdout
            reference.append(json.loads(out.strip().splitlines()[-1])["ms_median"] / 1000)
    theirs = statistics.median(reference) if reference else RECORDED_MS / 1000
    rows = [row(name, t, theirs) for name, t in times.items()]
    rows.append({"name": "released code, " + ("this run" if reference else "as recorded"), "ms_median": theirs * 1000})
    return {"settings": "tests/golden/digits_reference.npz", "steps": args.steps, "rounds": args.rounds}, rows


def row(name: str, seconds: list[float], reference: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "name": name, "ms_median": median * 1000, "ms_min": min(seconds) * 1000, "times_faster": reference / median
    }  # fmt: skip


def dit(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Flow matching against the shortcut objective on a DiT: time, throughput, share of peak, memory."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    data = torch.randn(args.batch, 4, 32, 32, generator=generator, device=device)
    y = torch.randint(0, 1000, (args.batch,), generator=generator, device=device)
    objectives: dict[str, sf.Objective] = {
        "flow_matching": sf.FlowMatchingObjective(condition_dropout=0.1),
        "shortcut, k = 1/4": sf.ShortcutObjective(condition_dropout=0.1),
        "shortcut, k = 1/4, guided targets": sf.ShortcutObjective(condition_dropout=0.1, guidance_scale=1.5),
        "shortcut, k = 1/8": sf.ShortcutObjective(condition_dropout=0.1, bootstrap_fraction=1 / 8),
    }
    net: Any = backbones.create(args.backbone, shape=(4, 32, 32), num_classes=1000, **args.options).to(device)
    flops = net.flops(y=torch.zeros(1, dtype=torch.int64)) * args.batch
    # One step for all objectives: what is compiled for one of them serves the next.
    step = Step(
        net, objectives["flow_matching"], data, y, null_y=1000, average=sf.EMAConfig(), optimizer=OptimizerConfig(),
        compiled=args.compile, bfloat16=True,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name, objective in objectives.items():
        step.objective = objective
        evaluations = FORWARD_AND_BACKWARD + objective.target_evaluations(args.batch)
        rows.append({"name": name} | _timed(step, flops * evaluations, args.steps))
    for r in rows[1:]:
        r["times_flow_matching"] = r["ms_median"] / rows[0]["ms_median"]
    config = {name: getattr(args, name) for name in ("backbone", "options", "batch", "steps", "compile")}
    return config | {"bfloat16": True}, rows


def _timed(step: Step, flops: float, count: int) -> dict[str, Any]:
    """A row of a step that takes so many floating-point operations; memory is the most of the timed steps."""
    device = step.data.device
    seconds_of(step, 0, warm_up=5)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(seconds_of(step, count, warm_up=0))
    peak = peak_flops(device)
    return {
        "ms_median": seconds * 1000,
        "images_per_second": len(step.data) / seconds,
        "tflop_per_step": flops / 1e12,
        "share_of_peak": flops / seconds / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["digits", "dit"])
    parser.add_argument("--steps", type=int, default=100, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3, help="digits: rounds, ours and theirs in turn")
    parser.add_argument("--batch", type=int, default=256, help="dit: batch size")
    parser.add_argument("--backbone", default="dit_b_2", help="dit: name of the network")
    parser.add_argument("--options", type=json.loads, default={}, help="dit: the network's options, as JSON")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="dit: device")
    parser.add_argument("--reference-command", help="digits: times another implementation, see above")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results/")
    args = parser.parse_args()
    if args.compile is None:
        args.compile = args.case == "dit"
    device = torch.device(args.device if args.case == "dit" else "cpu")
    config, rows = dit(args) if args.case == "dit" else digits(args)
    print(f"{args.case} on {device_name(device)}, torch {torch.__version__}")
    print_rows(rows)
    if args.write:
        print(write_result(f"train_step_{args.backbone if args.case == 'dit' else args.case}", device, config, rows))


if __name__ == "__main__":
    main()
