"""Cost of training: the benchmarks see a fault put in on purpose, and the memory formula fits a run."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import loop, memory
from shortcutflow.data.stream import ShardStream
from shortcutflow.distributed import World
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives import ShortcutObjective
from shortcutflow.train.checkpoint_writer import CheckpointWriter
from shortcutflow.train.state import build_train_state
from tests.processes import run_forked

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TINY = {"width": 32, "depth": 1, "heads": 2, "patch": 4}
SHARDED = {"width": 128, "depth": 3, "heads": 2, "patch": 4}
SLOW_S = 0.1


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
    rows = measured(tmp_path, slowed(CheckpointWriter, "save"))
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


def test_memory_follows_the_formula_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(folder: Path, processes: int) -> None:
        done = run_forked(memory.count_here, folder, processes=processes)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(memory, "launch", fork)
    rows = memory.memory([2], SHARDED, tmp_path)
    counted = {row["name"]: row for row in rows if "off_percent" in row}
    assert set(counted) == {"weights, 2", "gradients, 2", "AdamW, 2", "average, 2", "all, 2"}
    assert all(abs(row["off_percent"]) < 10 for row in counted.values()), counted
    xl = {row["name"]: row["all_gib"] for row in rows if "all_gib" in row}
    assert xl["DiT-XL/2 on 1"] == pytest.approx(8 * xl["DiT-XL/2 on 8"])
    assert "| AdamW, 2 | " in memory.table_of(rows)


def test_a_forgotten_tensor_is_counted(tmp_path: Path) -> None:
    backbone = BackboneConfig(name="dit", options=TINY)
    config = loop.made_run(tmp_path / "shards", backbone, steps=1, global_batch_size=8, device="cpu")
    parts = build_train_state(config, World(0, 1, torch.device("cpu")))
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
