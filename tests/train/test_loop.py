"""The training loop in one process: what a run leaves, and configs that must run."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from recipes.digits import paper_recipe as recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.digits import DigitsData
from shortcutflow.data.source import DataInfo
from shortcutflow.models.model import load
from shortcutflow.run_dir import WEIGHTS_FILE
from shortcutflow.train import loop, state
from shortcutflow.train.loggers import METRICS_FILE, JSONLines, read_metrics
from shortcutflow.train.loop import train
from tests.train.launched import tensors


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
    assert load_file(tmp_path / WEIGHTS_FILE).keys() == config.build_network().state_dict().keys()
    assert (tmp_path / "grids" / "step_00000004.png").is_file()
    run = load(tmp_path)
    assert (run.config.step, run.weights) == (4, "ema")
    saved = tensors(tmp_path, 4)
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, saved[f"average_ema/{name}"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.kind=flow_matching"],
        ["target_weights=current"],
        ["emas.slow.decay=0.999", "emas.slow.warm_up=false", "sample_weights=slow"],
        ["objective.guidance_scale=1.5"],
        ["optimizer.schedule=cosine", "optimizer.warm_up_steps=2", "optimizer.max_grad_norm=0.1"],
        ["backbone.options.released=true", "objective.rows=released", "objective.clip=4"],
    ],
    ids=lambda o: o[0],
)
def test_configs_that_must_run(tmp_path: Path, shards: Path, overrides: list[str]) -> None:
    if overrides[0].startswith("emas.slow"):
        overrides = ['emas.slow={"decay": 0.999, "warm_up": false}', overrides[-1]]
    train(tiny(shards, "training.steps=2", "training.global_batch_size=16", *overrides), tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The graphs of all networks and passes of a run; as its default, inductor, only in the slow case."""
    train(tiny(shards, "training.steps=3"), tmp_path / "eager")
    if backend != "inductor":
        monkeypatch.setattr(state, "compile_options", lambda device: {"backend": backend})
    torch._dynamo.reset()
    counters.clear()
    train(tiny(shards, "training.steps=3", "training.compile=true"), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 1
    eager, compiled = tensors(tmp_path / "eager", 3), tensors(tmp_path / "compiled", 3)
    assert eager.keys() == compiled.keys()
    for name in eager:
        if not name.startswith("optimizer") and not name.endswith("qkv.bias"):
            assert (eager[name] - compiled[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("length", [3, 20, 60, 10_000])
def test_killed_while_resuming_keeps_the_lines(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Lines beyond the checkpoint are removed; stopped in the middle of that, a run has lost none of the others."""
    config, path = tiny(shards), tmp_path / METRICS_FILE
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))

    def cut_off(self: Path, content: bytes) -> None:
        self.open("wb").write(content[:length])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", cut_off)
        with pytest.raises(KeyboardInterrupt):
            JSONLines(config, tmp_path, 3)
    JSONLines(config, tmp_path, 3).close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_cut_off_metrics_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_steps_do_not_ask_the_data_what_it_is(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer may lie in a large manifest, or behind a URL: it is asked for before the steps, and for pictures."""
    calls: list[int] = []
    describe = DigitsData.describe

    def counted(self: DigitsData) -> DataInfo:
        calls.append(1)
        return describe(self)

    monkeypatch.setattr(DigitsData, "describe", counted)
    train(tiny(shards, "training.steps=2"), tmp_path / "short")
    few = len(calls)
    train(tiny(shards, "training.steps=9"), tmp_path / "long")
    assert len(calls) - few == few


@pytest.mark.parametrize("fails", [False, True])
def test_switches_are_put_back(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A run sets how PyTorch computes, and leaves the process as it found it, also after an error."""

    def switches() -> tuple[object, ...]:
        conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        matmul = torch.backends.cuda.matmul
        return matmul.fp32_precision, conv.fp32_precision, torch.are_deterministic_algorithms_enabled()

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, during = switches(), []
    built = loop.build_train_state

    def watched(*args: Any) -> Any:
        during.append(switches())
        if fails:
            raise ZeroDivisionError
        return built(*args)

    monkeypatch.setattr(loop, "build_train_state", watched)
    for tf32, deterministic in ((True, False), (False, True)):
        chosen = (f"training.tf32={json.dumps(tf32)}", f"training.deterministic={json.dumps(deterministic)}")
        config = tiny(shards, "training.steps=1", "training.grid_steps=[1]", *chosen)
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            train(config, tmp_path / str(tf32))
        assert switches() == before
    assert during == [("tf32", "tf32", False), ("ieee", "ieee", True)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
