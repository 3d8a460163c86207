"""Checkpoints are whole or not there, and give back exactly what was put in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shortcutflow.train import checkpoint
from shortcutflow.train.optim import OptimizerConfig, build_optimizer


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int64)}
    saved = checkpoint.save(tmp_path, 7, {"network": tensors}, {"images_seen": 70})
    assert checkpoint.latest_in(tmp_path) == saved
    loaded = saved.tensors("network")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert saved.state() == {"step": 7, "images_seen": 70}


def test_killed_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every write in turn, the checkpoint before stays the newest, and the next save succeeds."""
    good = checkpoint.save(tmp_path, 1, {"network": {"a": torch.ones(2)}}, {})
    sync = checkpoint._sync
    for survive in range(4):
        calls = iter(range(100))

        def failing(path: Path, calls=calls, survive=survive) -> None:
            if next(calls) == survive:
                raise OSError(28, "No space left on device")
            sync(path)

        monkeypatch.setattr(checkpoint, "_sync", failing)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, 2, {"network": {"a": torch.zeros(2)}, "optimizer": {"m": torch.zeros(1)}}, {})
        assert checkpoint.latest_in(tmp_path) == good
    monkeypatch.setattr(checkpoint, "_sync", sync)
    assert checkpoint.save(tmp_path, 2, {"network": {"a": torch.zeros(2)}}, {}) == checkpoint.latest_in(tmp_path)


def test_saving_over_the_same_step(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"network": {"a": torch.zeros(2)}}, {})
    again = checkpoint.save(tmp_path, 1, {"network": {"a": torch.ones(2)}}, {})
    assert torch.equal(again.tensors("network")["a"], torch.ones(2))


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        checkpoint.save(tmp_path, step, {"network": {"a": torch.zeros(1)}}, {})
    checkpoint.prune(tmp_path, keep=2)
    assert [c.step for c in checkpoint.all_in(tmp_path)] == [20, 100]


def test_missing_group_is_named(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, 1, {"network": {"a": torch.zeros(1)}}, {})
    with pytest.raises(FileNotFoundError, match="holds no 'average_ema'; it holds: network"):
        saved.tensors("average_ema")


def test_optimizer_state_round_trip() -> None:
    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net.parameters(), OptimizerConfig())
    step(net, optimizer)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    twin_optimizer = build_optimizer(twin.parameters(), OptimizerConfig())
    tensors = {name: t.clone() for name, t in checkpoint.optimizer_tensors(optimizer, net).items()}
    checkpoint.load_optimizer(twin_optimizer, twin, tensors)
    step(net, optimizer)
    step(twin, twin_optimizer)
    assert torch.equal(net.weight, twin.weight)

    with pytest.raises(ValueError, match="belongs to another network"):
        checkpoint.load_optimizer(twin_optimizer, nn.Linear(3, 2, bias=False), tensors)
