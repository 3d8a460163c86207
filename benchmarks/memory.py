"""What each process of a sharded run holds in memory, counted and by the formula.

    python benchmarks/memory.py --write     # a small DiT on 1, 2 and 4 processes: a minute

Counts the bytes of weights, gradients, AdamW's moments and an average in each process after a training step on gloo,
against 4 bytes x numbers kept a parameter x parameters / processes; then gives the formula for DiT-XL/2. Activations,
the units that are gathered while they run, and what the allocator keeps are not in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

import backbones
from benchmarks.loop import CLASSES, LATENT, PAGE, Row, made_run
from benchmarks.record import print_rows, put_into_page, write_result
from shortcutflow.config import RunConfig
from shortcutflow.distributed import joined
from shortcutflow.dtensor import to_local
from shortcutflow.network import BackboneConfig
from shortcutflow.train.heartbeat import Heartbeat
from shortcutflow.train.resume import Position
from shortcutflow.train.state import TrainState, build_train_state
from shortcutflow.train.step import clip_gradients, forward_backward, step_if_finite

COPIES = {"weights": 1, "gradients": 1, "AdamW": 2, "average": 1}
"""float32 numbers that are kept for each parameter."""
SMALL_DIT = {"width": 256, "depth": 6, "heads": 4}
START, END = "<!-- memory table: benchmarks/memory.py writes it -->", "<!-- end of memory table -->"


def main() -> None:
    """Count, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="counted on so many")
    parser.add_argument("--options", type=json.loads, default=SMALL_DIT, help="of the counted DiT, as JSON")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results and the table of {PAGE}")
    parser.add_argument("--count-here", type=Path, help=argparse.SUPPRESS)  # one of the processes
    args = parser.parse_args()
    if args.count_here:
        return count_here(args.count_here)
    with tempfile.TemporaryDirectory() as name:
        rows = memory(args.processes, args.options, Path(name))
    print_rows(rows)
    if args.write:
        config = {"processes": args.processes, "options": args.options}
        print(write_result("memory", torch.device("cpu"), config, rows))
        put_into_page(START, table_of(rows), END, page=PAGE)


def memory(processes: Iterable[int], options: dict[str, Any], folder: Path) -> list[Row]:
    """Bytes of the largest rank by kind, counted and by the formula; and the formula for DiT-XL/2."""
    config = made_run(
        folder / "shards", BackboneConfig(name="dit", options=options), steps=1, global_batch_size=16, device="cpu",
        parallel="fsdp", precision="bfloat16",
    )  # fmt: skip
    config.save(folder)
    rows = []
    parameters = parameters_of("dit", **options)
    for size in processes:
        counted = counted_bytes(folder, size)
        for kind, copies in COPIES.items():
            rows.append(counted_row(f"{kind}, {size}", counted[kind], 4 * copies * parameters / size))
        expected = 4 * sum(COPIES.values()) * parameters / size
        rows.append(counted_row(f"all, {size}", counted["all tensors"], expected))
    xl = parameters_of("dit_xl_2")
    for size in (1, 8):
        by_kind = {f"{kind}_gib": 4 * copies * xl / size / 2**30 for kind, copies in COPIES.items()}
        rows.append({"name": f"DiT-XL/2 on {size}", **by_kind, "all_gib": sum(by_kind.values())})
    return rows


def counted_row(name: str, counted: int, formula: float) -> Row:
    """What was counted beside the formula, and how far it is above it."""
    return {
        "name": name, "counted_bytes": counted, "formula_bytes": formula, "off_percent": 100 * (counted / formula - 1)
    }  # fmt: skip


def parameters_of(backbone: str, **options: Any) -> int:
    """How many numbers a network has that learns latents of 1,000 classes."""
    with torch.device("meta"):
        net = backbones.create(backbone, shape=LATENT, num_classes=CLASSES, **options)
    return sum(p.numel() for p in net.parameters())


def counted_bytes(folder: Path, processes: int) -> dict[str, int]:
    """Let so many processes train a step of the run in this folder; by kind, what the fullest of them holds."""
    launch(folder, processes)
    ranks = [json.loads((folder / f"bytes_{rank}.json").read_text()) for rank in range(processes)]
    return {kind: max(rank[kind] for rank in ranks) for kind in ranks[0]}


def launch(folder: Path, processes: int) -> None:
    """Run :func:`count_here` in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", "benchmarks.memory", "--count-here", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{done.stderr[-3000:]}")


def count_here(folder: Path) -> None:
    """One process of them."""
    config = RunConfig.load(folder)
    with joined("cpu", always_grouped=True) as world:
        state = build_train_state(config, world)
        heartbeat = Heartbeat(folder, world.rank, world.size, 0)
        reports = forward_backward(config, state, world, next(state.stream), Position(), 0, heartbeat)
        grad_norm = clip_gradients(state.optimizer, None)
        assert step_if_finite(state.optimizer, world, reports, grad_norm, False) == (False, False)
        del reports
        (folder / f"bytes_{world.rank}.json").write_text(json.dumps(bytes_held(state)))


def bytes_held(state: TrainState) -> dict[str, int]:
    """Bytes of this process's tensors by kind, with their padding; each piece of memory once."""
    weights = list(state.network.parameters())
    kinds: dict[str, list[Any]] = {
        "weights": weights,
        "gradients": [p.grad for p in weights if p.grad is not None],
        "AdamW": [value for held in state.optimizer.state.values() for value in held.values()],
        "average": [p for average in state.emas.values() for p in average.network.parameters()],
    }
    counted = {kind: _bytes_of(tensors) for kind, tensors in kinds.items()}
    # Of everything alive: a whole weight that sharding forgot to give back would be here.
    gc.collect()
    counted["all tensors"] = _bytes_of(found for found in gc.get_objects() if _has_memory(found))
    return counted


def _has_memory(found: object) -> bool:
    # By type: asking an object for its class may run code of its own. Fake tensors have a shape only.
    return issubclass(type(found), Tensor) and not issubclass(type(found), FakeTensor)


def _bytes_of(tensors: Iterable[Any]) -> int:
    storages = [to_local(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def table_of(rows: list[Row]) -> str:
    """As Markdown: counted against the formula, then DiT-XL/2."""
    lines = ["| a small DiT, processes | counted | formula | off |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        if "off_percent" in row:
            counted, formula = row["counted_bytes"] / 2**20, row["formula_bytes"] / 2**20
            lines.append(f"| {row['name']} | {counted:.2f} MiB | {formula:.2f} MiB | {row['off_percent']:+.1f}% |")
    lines += ["", f"| GPUs | {' | '.join(COPIES)} | all |", "| --- |" + " ---: |" * (len(COPIES) + 1)]
    for row in rows:
        if "all_gib" in row:
            sizes = " | ".join(f"{row[f'{kind}_gib']:.2f} GiB" for kind in [*COPIES, "all"])
            lines.append(f"| {row['name']} | {sizes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
