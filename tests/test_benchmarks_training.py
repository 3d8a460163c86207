"""Cost and scale of training: the benchmarks see a fault put in on purpose, and the predictions fit hand and run."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import loop, memory, scaling
from benchmarks.scaling_model import PLANS, Collective, Machine, Model, Plan, collectives, described, predicted
from shortcutflow.data.stream import ShardStream
from shortcutflow.distributed import World
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.train import step
from shortcutflow.train.checkpoint import Saver
from shortcutflow.train.parts import build_parts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TINY = {"width": 32, "depth": 1, "heads": 2, "patch": 4}
SHARDED = {"width": 128, "depth": 3, "heads": 2, "patch": 4}
SLOW_S = 0.1
SMALL = Model("small", flops=1e9, units=4, rounded=80_000_000, exact=20_000_000)


# ---- the loop


def measured(folder: Path, fault: Any) -> dict[str, dict[str, Any]]:
    args = argparse.Namespace(backbone="dit", options=TINY, batch=4, steps=4, device="cpu")
    with fault:
        rows = loop.measure(args, folder)
    return {row["name"]: row for row in rows}


def slowed(owner: Any, name: str) -> Any:
    """This method takes SLOW_S longer."""
    run = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW_S)
        return run(*args, **kwargs)

    return mock.patch.object(owner, name, slow)


def test_slow_data_counts_as_the_loops(tmp_path: Path) -> None:
    step = measured(tmp_path, slowed(ShardStream, "__next__"))["a step"]
    assert step["ms"] > step["loop_ms"] > 1000 * SLOW_S
    assert step["loop_percent"] == pytest.approx(100 * step["loop_ms"] / step["ms"])


def test_a_slow_objective_does_not(tmp_path: Path) -> None:
    step = measured(tmp_path, slowed(ShortcutObjective, "__call__"))["a step"]
    assert step["ms"] > 1000 * SLOW_S > step["loop_ms"]


def test_a_save_that_waits_is_seen_as_a_stall(tmp_path: Path) -> None:
    rows = measured(tmp_path, slowed(Saver, "save"))
    row = rows["a checkpoint"]
    assert row["stall_ms"] > 900 * SLOW_S
    assert row["synchronous_ms"] > 1000 * SLOW_S
    assert f"{row['stall_in_steps']:.2f} steps" in loop.table_of(list(rows.values()))


@pytest.mark.skipif(not (RESULTS / "loop_cpu.json").exists(), reason="not measured yet")
def test_the_loop_as_committed() -> None:
    """Under 3 % of a DiT-B/2 step, and a checkpoint holds training up for less than one step."""
    result = json.loads((RESULTS / "loop_cpu.json").read_text())
    _, lines, checkpoint = result["rows"]
    assert result["config"]["backbone"] == "dit_b_2"
    assert lines["loop_percent"] < 3
    assert checkpoint["stall_in_steps"] < 1


# ---- the memory of shards


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A step of a sharded run in two processes: its folder, and the rows of the memory benchmark."""
    folder = tmp_path_factory.mktemp("two")
    with mock.patch.object(memory, "COUNTED_BY", "tests.test_benchmarks_training"):
        return folder, memory.memory([2], SHARDED, folder)


def test_memory_follows_the_formula_on_two_processes(two_processes: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = two_processes[1]
    counted = {row["name"]: row for row in rows if "off_percent" in row}
    assert set(counted) == {"weights, 2", "gradients, 2", "AdamW, 2", "average, 2", "all, 2"}
    assert all(abs(row["off_percent"]) < 10 for row in counted.values()), counted
    xl = {row["name"]: row["all_gib"] for row in rows if "all_gib" in row}
    assert xl["DiT-XL/2 on 1"] == pytest.approx(8 * xl["DiT-XL/2 on 8"])
    assert "| AdamW, 2 | " in memory.table_of(rows)


def test_a_forgotten_tensor_is_counted(tmp_path: Path) -> None:
    backbone = BackboneConfig(name="dit", options=TINY)
    config = loop.made_run(tmp_path / "shards", backbone, steps=1, global_batch_size=8, device="cpu")
    parts = build_parts(config, World(0, 1, torch.device("cpu")))
    before = memory.bytes_held(parts)
    forgotten = torch.empty(1_000_000)
    views = [forgotten.view(1000, 1000), forgotten[:10]]
    after = memory.bytes_held(parts)
    assert after["all tensors"] - before["all tensors"] == 4_000_000, "once, however many views it has"
    assert after["weights"] == before["weights"] == 4 * sum(p.numel() for p in parts.network.parameters())
    assert len(views) == 2


def test_memory_as_committed() -> None:
    """Within 10 % of the formula on 1, 2 and 4 processes."""
    rows = json.loads((RESULTS / "memory_cpu.json").read_text())["rows"]
    off = {row["name"]: row["off_percent"] for row in rows if "off_percent" in row}
    assert {name.split(", ")[1] for name in off} == {"1", "2", "4"}
    assert all(abs(percent) < 10 for percent in off.values())


# ---- scale on paper


@pytest.mark.parametrize("plan", PLANS)
def test_one_gpu_sends_nothing(plan: Plan) -> None:
    step = predicted(SMALL, plan, 1, 64, Machine())
    assert step.moved == step.communication == 0
    assert step.seconds == Machine().fixed + step.compute + step.optimizer


@pytest.mark.parametrize(
    ("collective", "seconds"),
    [
        # 2 x 7/8 x 8 GB at 360 GB/s; 3 hops up and 3 down of 2 us.
        (Collective("reduce", 8e9, 8, 8), 14 / 360 + 12e-6),
        # 15/16 x 16 GB at 320 GB/s of a machine; a ring of 15 hops, one of them between machines.
        (Collective("gather", 16e9, 16, 8), 15 / 320 + 14 * 2e-6 + 6e-6),
        (Collective("scatter", 16e9, 16, 8), 15 / 320 + 14 * 2e-6 + 6e-6),
        # One of a machine's eight groups has an eighth of its way out; 2 hops up and 2 down between four machines.
        (Collective("reduce", 1e9, 4, 1), 1.5 / 40 + 4 * 6e-6),
    ],
    ids=["reduce inside a machine", "gather across two", "scatter across two", "reduce among copies"],
)
def test_a_collective_by_hand(collective: Collective, seconds: float) -> None:
    assert collective.seconds(Machine(inside=360e9, between=320e9)) == pytest.approx(seconds, rel=1e-12)


def test_bytes_by_hand() -> None:
    """80 M parameters in bfloat16 and 20 M in float32 are gathered four times; all gradients are float32."""
    machine, gathered, gradients = Machine(), 2 * 80e6 + 4 * 20e6, 4 * 100e6
    ddp, fsdp, hybrid = (predicted(SMALL, plan, 16, 512, machine).moved for plan in PLANS)
    assert ddp == pytest.approx(2 * 15 / 16 * gradients)
    assert fsdp == pytest.approx(15 / 16 * (4 * gathered + gradients))
    assert hybrid == pytest.approx(7 / 8 * (4 * gathered + gradients) + 2 * 1 / 2 * gradients / 8)


def test_a_step_by_hand() -> None:
    """8 GPUs, DDP, 32 rows each with 8 of bootstrap: 112 evaluations of 1 ms, of which 64 in the backward pass."""
    machine = Machine(peak=1e12, utilisation=1, memory=1e12, inside=1e9, hop_inside=0, fixed=0.25, exposed=0.1)
    step = predicted(SMALL, "ddp", 8, 256, machine)
    communication = 2 * 7 / 8 * 4e8 / 1e9
    assert step.compute == pytest.approx(0.112)
    assert step.optimizer == pytest.approx(4 * 11 * 1e8 / 1e12)
    assert step.communication == pytest.approx(communication)
    tiny_reductions = 2 * 2 * 7 / 8 * 8 / 1e9
    assert step.seconds == pytest.approx(0.25 + 0.112 + 0.0044 + (communication - 0.064) + tiny_reductions)
    fast = predicted(SMALL, "ddp", 8, 256, Machine(peak=1e12, utilisation=1, memory=1e12, inside=1e11, hop_inside=0))
    assert fast.seconds - fast.compute - fast.optimizer - 5e-3 == pytest.approx(0.1 * communication / 100, rel=1e-3)


@pytest.mark.parametrize("plan", PLANS)
def test_more_gpus_and_slower_links_cost_more(plan: Plan) -> None:
    steps = [predicted(SMALL, plan, gpus, 32 * gpus, Machine()) for gpus in scaling.SIZES]
    assert all(a.communication < b.communication for a, b in pairwise(steps))
    assert all(a.moved < b.moved for a, b in pairwise(steps))
    slow = predicted(SMALL, plan, 64, 2048, Machine(between=1e9))
    assert slow.seconds > predicted(SMALL, plan, 64, 2048, Machine(between=2e9)).seconds


def test_without_costs_scaling_is_perfect_until_rows_run_out() -> None:
    free = Machine(memory=math.inf, inside=math.inf, between=math.inf, hop_inside=0, hop_between=0, fixed=0)
    rows = scaling.rows_of(SMALL, "ddp", "free", batch=256, strong=True, machine=free)
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256], "no GPU without a sample"
    even = [row["efficiency"] for row in rows if row["gpus"] <= 64]
    assert even == pytest.approx([1] * 7)
    # On 256 GPUs some have a bootstrap row, of 5 evaluations, and the others wait; the mean is 3.5.
    assert rows[-1]["efficiency"] == pytest.approx(3.5 / 5)
    assert scaling.stops_at(rows) is None
    assert scaling.stops_at([{"gpus": 4, "efficiency": 0.5}, {"gpus": 8, "efficiency": 0.49}]) == 8


def test_measured_seconds_replace_the_assumed_ones(tmp_path: Path) -> None:
    result = tmp_path / "train_step.json"
    result.write_text(json.dumps({"rows": [{"name": "shortcut, k = 1/4", "images_per_second": 400.0}]}))
    name, seconds = scaling.measured(f"dit_b_2={result}")
    assert (name, seconds) == scaling.measured("dit_b_2=0.0025")
    known = SMALL._replace(seconds=seconds / 3.5)
    assert predicted(known, "ddp", 1, 256, Machine()).compute == pytest.approx(256 / 400)
    with pytest.raises(ValueError, match="takes NAME=SECONDS or NAME=FILE, got '3'"):
        scaling.measured("3")
    result.write_text(json.dumps({"rows": [{"name": "other"}]}))
    with pytest.raises(ValueError, match=r"has no row 'shortcut, k = 1/4'; it has: other"):
        scaling.measured(f"dit_b_2={result}")


def test_the_command_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    argv = ["scaling.py", "--backbones", "dit_s_8", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", argv)
    scaling.main()
    assert capsys.readouterr().out.count("below half:") == 12
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- the collectives of a real run


def test_collectives_are_those_of_a_real_run(two_processes: tuple[Path, list[dict[str, Any]]]) -> None:
    """Sharded, in bfloat16: as many of each kind, and their bytes but for padding."""
    real = Counter(tuple(each) for each in json.loads((two_processes[0] / "sent.json").read_text()))
    model = described("dit", **SHARDED)
    expected = Counter((each.kind, round(each.bytes)) for each in collectives(model, "fsdp", 2, Machine()))
    assert len(real) == len(expected) == 4
    for (kind, size), count in expected.items():
        near = [n for (k, s), n in real.items() if k == kind and abs(s / size - 1) < 0.01]
        assert near == [count], (kind, size, real)


class Recorded(TorchDispatchMode):
    """Kind and bytes of the whole tensor of each collective."""

    KINDS = (("_allgather_base_", "gather"), ("_reduce_scatter_base_", "scatter"), ("allreduce_", "reduce"))

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, kind in self.KINDS:
            if f"c10d.{name}." in str(func):
                tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
                sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
                self.sent.append((kind, max(sizes)))
        return func(*args, **(kwargs or {}))


def count_and_record(folder: Path) -> None:
    """One of two processes: what the memory benchmark counts, and the collectives of its forward and backward pass."""
    recorded, run = Recorded(), step.backward_pass

    def backward_pass(*args: Any) -> Any:
        with recorded:
            return run(*args)

    with mock.patch.object(memory, "backward_pass", backward_pass):
        memory.count_here(folder)
    if os.environ["RANK"] == "0":
        (folder / "sent.json").write_text(json.dumps(recorded.sent))


if __name__ == "__main__":
    count_and_record(Path(sys.argv[2]))
