"""The parts of benchmarks/gpu.py: what each runs, and at which size."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import data, loop, sampling, scan, train_step
from benchmarks.recipe_run import ROOT, run_recipe
from shortcutflow.config import RunConfig

Row = dict[str, Any]
TINY = {"width": 32, "depth": 1, "heads": 2, "patch": 8}
TRY_STEPS = 60
"""Of the run that finds out how many steps of CIFAR-10 fit the time."""


class Call(NamedTuple):
    """What a part is given.

    Attributes:
        device: "cuda", or "cpu" for a toy run.
        seconds: until it is stopped.
        results: folder for files that are no numbers, such as samples.
        scratch: folder for what an interrupted part needs to go on.
        pictures: of CIFAR-10, anything that ``shortcutflow prepare`` takes; None where there are none.
    """

    device: str
    seconds: float
    results: Path
    scratch: Path
    pictures: Path | None

    @property
    def toy(self) -> bool:
        """Whether everything is tiny."""
        return self.device == "cpu"

    def network(self, name: str) -> dict[str, Any]:
        """Arguments for a backbone, or for a tiny one."""
        return {"backbone": "dit", "options": TINY} if self.toy else {"backbone": name, "options": {}}


class Part(NamedTuple):
    """One part: what it does, and how many minutes it may take; it is not begun with fewer than ``least`` left."""

    run: Callable[[Call], list[Row]]
    minutes: float
    least: float = 0.5


def tests(call: Call, paths: Sequence[str]) -> list[Row]:
    """Run tests on the device; a row with what pytest counted.

    Raises:
        RuntimeError: with the end of the output if one fails or none passes.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths]
    done = subprocess.run([*command, "--device", call.device], cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().rpartition("\n")[2]
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if done.returncode or not counts.get("passed"):
        raise RuntimeError(f"{' '.join(paths)} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return [{"name": " ".join(paths), **counts}]


def scans(call: Call) -> list[Row]:
    """Mamba's mixer beside attention: with the library's scan, and with mamba-ssm's kernels where they are."""
    installed = importlib.util.find_spec("mamba_ssm") is not None and not call.toy
    small = {"tokens": [16], "width": 24, "heads": 2, "repeats": 1}
    args = argparse.Namespace(
        tokens=[256, 1024, 4096], batch=64, most_tokens=65536, width=384, heads=6, repeats=10, device=call.device,
        bfloat16=not call.toy,
    )  # fmt: skip
    vars(args).update(small if call.toy else {})
    rows: list[Row] = []
    for kernels in ["torch"] + ["mamba-ssm"] * installed:
        args.kernels = kernels
        rows += [{"kernels": kernels, **row} for tokens in args.tokens for row in scan.rows_of(tokens, args)]
    if not installed:
        how = "pip install --no-build-isolation 'shortcutflow[mamba]'"
        rows.append({"name": "mamba-ssm", "missing": f"not installed: {how}"})
    return rows


def training(call: Call, backbone: str, compiled: bool) -> list[Row]:
    """Steps of all objectives at batch 256, or the largest half, quarter, ... of it that fits the memory."""
    args = argparse.Namespace(
        **call.network(backbone), device=call.device, batch=8 if call.toy else 256, steps=1 if call.toy else 20,
        compile=compiled,
    )  # fmt: skip
    too_large: list[int] = []
    while True:
        try:
            config, rows = train_step.dit(args)
            return [{**row, "batch": config["batch"], "did_not_fit": too_large} for row in rows]
        except torch.OutOfMemoryError:
            if args.batch <= 8:
                raise
        # Out here the exception, whose frames hold the network, is gone.
        too_large.append(args.batch)
        args.batch //= 2
        torch.cuda.empty_cache()


def sampled(call: Call) -> list[Row]:
    """``sample`` beside bare calls, eager and compiled: latency of one sample, rate of many."""
    rows = []
    for compiled in (False, True):
        args = argparse.Namespace(
            **call.network("dit_b_2"), device=call.device, batch=[1, 4 if call.toy else 256],
            steps=[1, 4] if call.toy else [1, 2, 4, 128], rounds=1 if call.toy else 5, compile=compiled,
        )  # fmt: skip
        rows += [{"compiled": compiled, **row} for row in sampling.measure(args)]
    return rows


def loop_and_saving(call: Call) -> list[Row]:
    """The loop's share of a step, and how long a checkpoint holds training up."""
    call.scratch.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(
        **call.network("dit_b_2"), batch=4 if call.toy else 64, steps=4 if call.toy else 30, device=call.device
    )
    made = call.scratch / "loop"
    shutil.rmtree(made, ignore_errors=True)  # what a loop that was cut off left there
    return loop.measure(args, made)


def loader(call: Call) -> list[Row]:
    """The data stream on this machine's processor."""
    torch.set_num_threads(1)
    made = call.scratch / "loader"
    shutil.rmtree(made, ignore_errors=True)
    scale, rounds = (0.02, 1) if call.toy else (1.0, 5)
    options = argparse.Namespace(rounds=rounds, scale=scale)
    photographs = data.made_photographs(made / "raw", max(4, int(64 * scale)))
    rows = []
    for group in (data.decode, data.small, data.latents):
        rows += [{"group": group.__name__, **row} for row in group(made, photographs, options)]
    return rows


def cifar10(call: Call) -> list[Row]:
    """Train the recipe ``unet_cifar10`` for the time there is, and keep its last grid of samples.

    Raises:
        ValueError: without pictures.
    """
    folder = call.scratch / "cifar10"
    if call.toy:
        return _trained(folder, ["--smoke", "evaluation=null"], call)
    if call.pictures is None:
        raise ValueError("no pictures of CIFAR-10: give --cifar PATH, a folder, an archive or a parquet file of them")
    begin = time.monotonic()
    options = [f"data.path={call.pictures.resolve()}", f"data.folder={folder / 'shards'}", "evaluation=null"]
    if not (folder / "run" / "config.json").exists():
        (speed,) = _trained(folder / "try", [*options, f"training.steps={TRY_STEPS}", "training.log_every=20"], call)
        batch = RunConfig.load(folder / "try" / "run").training.global_batch_size
        left = call.seconds - (time.monotonic() - begin)
        # A tenth for the samples and the start.
        steps = int(0.9 * left * speed["images_per_second"] / batch)
    else:
        steps = RunConfig.load(folder / "run").training.steps
    return _trained(folder, [*options, f"training.steps={steps}", "training.checkpoint_every=500"], call)


def _trained(folder: Path, options: list[str], call: Call) -> list[Row]:
    run_dir = folder / "run"
    trained = run_recipe("unet_cifar10", run_dir, options)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    grid = max((run_dir / "grids").glob("step_*.png"))
    call.results.mkdir(parents=True, exist_ok=True)
    samples = shutil.copyfile(grid, call.results / f"gpu_cifar10_{call.device}.png")
    shown = ("step", "loss", "images_per_second", "memory_bytes", "model_flops_utilisation", "data_waiting_share")
    row = {"name": "unet_cifar10", "seconds": trained.seconds, "samples": samples.name}
    return [row | {key: last[key] for key in shown if key in last}]


CONTRACT = "tests/backbones_contract"
PARTS: dict[str, Part] = {
    "parity": Part(partial(tests, paths=("tests/parity",)), 3),
    "contract": Part(partial(tests, paths=(f"{CONTRACT}/test_device.py", f"{CONTRACT}/test_mamba.py")), 3),
    **{
        f"training {name}, {mode}": Part(partial(training, backbone=name, compiled=mode == "compiled"), 4)
        for name in ("dit_b_2", "dit_xl_2", "dit_s_2", "dit_l_2")
        for mode in ("compiled", "eager")
    },
    "sampling": Part(sampled, 4),
    "loop and saving": Part(loop_and_saving, 3),
    "scan": Part(scans, 2),
    "loader": Part(loader, 2),
    "cifar10": Part(cifar10, 15, least=3),
}  # fmt: skip
"""By name, in the order they run: what matters most first."""
