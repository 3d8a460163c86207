"""Runs that begin with trained weights: a flow becomes a shortcut model, with or without being its teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import shortcutflow as sf
from shortcutflow.config import RunConfig
from shortcutflow.launch import Options, run_recipe
from shortcutflow.models.model import load
from shortcutflow.train.loop import train
from tests.train.test_loop import tiny
from tests.train.test_teacher import same, tensors


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of flow matching, and the shards that it was trained on."""
    root = tmp_path_factory.mktemp("flow")
    train(tiny(root / "digits", "objective.kind=flow_matching", "optimizer.lr=0.05"), root / "run")
    return root / "run", root / "digits"


def asked(network: sf.Network, d: float) -> torch.Tensor:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x, torch.linspace(0, 0.875, 8), torch.full((8,), d), torch.arange(8))


def begun(start: Path, shards: Path, run_dir: Path, *overrides: str) -> RunConfig:
    """A run after a step that moves nothing: its weights are those it began with."""
    frozen = ["training.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0", f"start={start}"]
    config = tiny(shards, *frozen, *overrides)
    train(config, run_dir)
    return config


def test_at_first_every_step_size_has_the_velocity_of_the_flow(flow: tuple[Path, Path], tmp_path: Path) -> None:
    begun(*flow, tmp_path / "run")
    before, after = load(flow[0]).network, load(tmp_path / "run", weights="current").network
    velocity = asked(before, 0.0)
    for d in (0.0, 1 / 128, 1 / 16, 1.0):
        torch.testing.assert_close(asked(after, d), velocity, rtol=0, atol=2e-6)
    # The flow itself was never told a step size and answers at random.
    assert float((asked(before, 1.0) - velocity).abs().max()) > 1e-4


def test_another_finest_step_is_honoured_for_a_flow_and_refused_for_known_sizes(
    flow: tuple[Path, Path], tmp_path: Path
) -> None:
    begun(*flow, tmp_path / "run", "objective.finest_steps=64")
    velocity = asked(load(flow[0]).network, 0.0)  # M of a flow is 128
    after = load(tmp_path / "run", weights="current").network
    for d in (0.0, 1 / 64, 1 / 2):
        torch.testing.assert_close(asked(after, d), velocity, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"run was trained with finest_steps=64 .* this run has finest_steps=128"):
        begun(tmp_path / "run", flow[1], tmp_path / "other")


def test_step_sizes_can_be_learnt_from_there(flow: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny(flow[1], f"start={flow[0]}", "optimizer.lr=0.01", "optimizer.warm_up_steps=0")
    train(config, tmp_path / "run")
    network = load(tmp_path / "run", weights="current").network
    assert float((asked(network, 1.0) - asked(network, 0.0)).abs().max()) > 1e-4


def test_a_shortcut_model_keeps_what_it_knows_of_step_sizes(flow: tuple[Path, Path], tmp_path: Path) -> None:
    train(tiny(flow[1], "optimizer.lr=0.05"), tmp_path / "first")
    begun(tmp_path / "first", flow[1], tmp_path / "run")
    assert same(tensors(tmp_path / "run", 1, "network"), tensors(tmp_path / "first", 6, "average_ema"))


def test_a_model_folder_is_a_start_too(flow: tuple[Path, Path], tmp_path: Path) -> None:
    sf.load(flow[0]).save(tmp_path / "model")
    begun(tmp_path / "model", flow[1], tmp_path / "a")
    begun(flow[0], flow[1], tmp_path / "b")
    assert same(tensors(tmp_path / "a", 1, "network"), tensors(tmp_path / "b", 1, "network"))


def test_the_start_teaches(flow: tuple[Path, Path], tmp_path: Path) -> None:
    options = [f"teacher={flow[0]}", "objective.flow_of=teacher", "objective.bootstrap_fraction=0"]
    begun(*flow, tmp_path / "run", *options)
    assert same(tensors(tmp_path / "run", 1, "teacher"), tensors(flow[0], 6, "average_ema"))
    losses = [line.split('"loss_flow": ')[1].split(",")[0] for line in (tmp_path / "run/metrics.jsonl").open()]
    # It is the teacher, so there is nothing to learn; from data there would be.
    assert float(losses[0]) < 1e-9
    begun(*flow, tmp_path / "other", "objective.bootstrap_fraction=0")
    assert '"loss_flow": 0.0' not in (tmp_path / "other/metrics.jsonl").read_text()


def test_a_resumed_run_does_not_begin_again(flow: tuple[Path, Path], tmp_path: Path) -> None:
    options = [f"start={flow[0]}", "objective.bootstrap_from=0.5", "training.steps=6"]
    train(tiny(flow[1], *options), tmp_path / "whole")
    train(tiny(flow[1], *options), tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_00000006")
    train(tiny(flow[1], *options), tmp_path / "resumed", resume=True)
    for group in ("network", "average_ema", "optimizer"):
        assert same(tensors(tmp_path / "whole", 6, group), tensors(tmp_path / "resumed", 6, group))


def test_what_cannot_be_a_start(flow: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its start, so both need the same backbone: .*'depth': 1"):
        train(tiny(flow[1], f"start={flow[0]}", "backbone.options.depth=2"), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(tiny(flow[1], f"start={tmp_path}/nowhere"), tmp_path / "run")
    sf.load(flow[0], image_size=16).save(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"its shape is \(1, 16, 16\), that of this run's data is \(1, 8, 8\)"):
        train(tiny(flow[1], f"start={tmp_path}/larger"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_smoke_run_begins_with_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path / "digits", "start=a/model", "teacher=a/model", "objective.flow_of=teacher")
    folder = run_recipe(config, [], Options(run_dir=tmp_path / "run", smoke=True))
    assert "random weights in data/smoke-model-" in capsys.readouterr().out
    assert folder is not None
    assert load(folder).config.step == 4
