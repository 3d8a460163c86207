"""The training loop: exact resume after a kill, and a stop before bad numbers reach the weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.digits import recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.stream import ShardStream
from shortcutflow.evaluation.runs import load_run
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.train import checkpoint
from shortcutflow.train.loop import NonFiniteError, train
from shortcutflow.train.metrics import read_metrics
from shortcutflow.types import Batch

KILLED_AT_5 = """
import os, signal, sys
from pathlib import Path
from shortcutflow.config import RunConfig
from shortcutflow.train.loop import train
from shortcutflow.train.metrics import MetricsLog

write = MetricsLog.numbers
def numbers(self, step, values):
    write(self, step, values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsLog.numbers = numbers
train(RunConfig.load(Path(sys.argv[1])), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "digits"


def tiny(shards: Path, *overrides: str) -> RunConfig:
    small = [
        "training.steps=6", "training.global_batch_size=8", "training.log_every=1", "training.checkpoint_every=3",
        "training.grid_steps=[1,2]", "backbone.options.width=16", "backbone.options.depth=1", f"data.folder={shards}",
        "evaluation=null",
    ]  # fmt: skip
    return with_overrides(recipe(), [*small, *overrides])


def tensors_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return {f"{f.stem}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kill_and_resume_is_bit_exact(tmp_path: Path, shards: Path, precision: str) -> None:
    """6 steps = 3 + SIGKILL two steps later + resume: weights, averages, optimizer, data position, metrics."""
    config = tiny(shards, f"training.precision={precision}")
    whole, patched = tmp_path / "whole", tmp_path / "patched"
    train(config, whole)

    patched.mkdir()
    config.save(patched)
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_5, str(patched)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    last = checkpoint.latest_in(patched / "checkpoints")
    assert last is not None
    assert last.step == 3
    train(config, patched, resume=True)

    expected, got = tensors_of(whole, 6), tensors_of(patched, 6)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    newest = [checkpoint.latest_in(run / "checkpoints") for run in (whole, patched)]
    assert newest[0] is not None
    assert newest[1] is not None
    assert newest[0].state() == newest[1].state()

    lines = [read_metrics(run / "metrics.jsonl") for run in (whole, patched)]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_second"} == {
            k: v for k, v in b.items() if k != "images_per_second"
        }
    assert not torch.equal(tensors_of(whole, 3)["network/head.out.bias"], expected["network/head.out.bias"])


def test_another_seed_is_another_run(tmp_path: Path, shards: Path) -> None:
    """The negative control of the test above: equality is not for free."""
    train(tiny(shards), tmp_path / "a")
    train(tiny(shards, "seed=1"), tmp_path / "b")
    a, b = tensors_of(tmp_path / "a", 6), tensors_of(tmp_path / "b", 6)
    assert not torch.equal(a["network/head.out.weight"], b["network/head.out.weight"])


def test_nan_in_the_data_stops_before_the_weights_change(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardStream.__next__
    count = iter(range(1000))

    def sometimes_broken(self: ShardStream) -> Batch:
        batch = read(self)
        if next(count) == 4:
            batch.data[2, 0, 3, 3] = math.nan
        return batch

    monkeypatch.setattr(ShardStream, "__next__", sometimes_broken)
    weights = watch_weights(monkeypatch)
    with pytest.raises(NonFiniteError) as caught:
        train(tiny(shards), tmp_path)
    message = str(caught.value)
    assert "step 5: not finite" in message
    assert "the data of digit" in message
    assert str(tmp_path / "checkpoints" / "step_00000003") in message
    assert len(weights) == 4, "the optimizer took the four good steps and no more"
    assert all(w.isfinite().all() for w in weights)


def test_infinite_loss_stops(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that is fine and a loss that is not: the losses are named, no sample is blamed."""
    original = ShortcutObjective.targets

    def broken(self: ShortcutObjective, *args, **kwargs):
        targets = original(self, *args, **kwargs)
        targets.v[-1] = math.inf
        return targets

    monkeypatch.setattr(ShortcutObjective, "targets", broken)
    with pytest.raises(NonFiniteError, match=r"step 1: not finite \(loss inf, loss_flow inf, loss_bootstrap") as caught:
        train(tiny(shards), tmp_path)
    assert "no checkpoint was written before" in str(caught.value)
    assert "the data of" not in str(caught.value)


def watch_weights(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A copy of the first parameter after each optimizer step."""
    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        seen.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_what_a_run_leaves(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards, "training.global_batch_size=32", "training.steps=4")
    train(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in (
        "loss",
        "loss_flow",
        "loss_bootstrap",
        "grad_norm",
        "images_per_second",
        "lr",
        "v_magnitude_bootstrap",
    ):
        assert all(math.isfinite(line[name]) for line in lines), name
    assert [line["images_seen"] for line in lines] == [32, 64, 96, 128]
    sizes = {name for line in lines for name in line if name.startswith("error_at/")}
    assert sizes == {f"error_at/d=1_{2**k}" for k in range(7)}, "8 bootstrap rows a batch cover all 7 sizes"
    assert RunConfig.load(tmp_path) == config
    assert list(tmp_path.glob("tensorboard/events*"))
    assert (tmp_path / "grids" / "step_00000004.png").is_file()
    run = load_run(tmp_path)
    assert (run.step, run.weights) == (4, "ema")
    saved = tensors_of(tmp_path, 4)
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, saved[f"average_ema/{name}"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.kind=flow_matching"],
        ["target_weights=current"],
        ["averages.slow.decay=0.999", "averages.slow.warm_up=false", "sample_weights=slow"],
        ["objective.guidance_scale=1.5"],
        ["optimizer.schedule=cosine", "optimizer.warm_up_steps=2", "optimizer.max_grad_norm=0.1"],
        ["backbone.options.released=true", "objective.rows=released", "objective.clip=4"],
    ],
    ids=lambda o: o[0],
)
def test_configs_that_must_run(tmp_path: Path, shards: Path, overrides: list[str]) -> None:
    if overrides[0].startswith("averages.slow"):
        overrides = ['averages.slow={"decay": 0.999, "warm_up": false}', overrides[-1]]
    train(tiny(shards, "training.steps=2", "training.global_batch_size=16", *overrides), tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_compiled_equals_eager(tmp_path: Path, shards: Path) -> None:
    train(tiny(shards, "training.steps=3"), tmp_path / "eager")
    train(tiny(shards, "training.steps=3", "training.compile=true"), tmp_path / "compiled")
    eager, compiled = tensors_of(tmp_path / "eager", 3), tensors_of(tmp_path / "compiled", 3)
    assert eager.keys() == compiled.keys()
    for name in eager:
        if not name.startswith("optimizer") and not name.endswith("qkv.bias"):
            assert (eager[name] - compiled[name]).abs().max() < 1e-4, name


def test_several_processes_are_refused(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains on one process"):
        train(tiny(shards), tmp_path)


def test_cut_off_metrics_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
