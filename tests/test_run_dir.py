"""A run's folder: every way of opening it takes the same weights, and none needs the data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shortcutflow as sf
from shortcutflow.cli import main
from shortcutflow.config import RunConfig
from shortcutflow.data.digits import write_digits
from shortcutflow.run_dir import WEIGHTS_FILE
from shortcutflow.train.init_from import load_start, open_teacher
from shortcutflow.train.loop import train
from tests.train.launched import Job, do, tensors, tiny


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that finished, was resumed with more steps and then stopped; and its shards."""
    root = tmp_path_factory.mktemp("stopped")
    write_digits(root / "shards")
    config = tiny(root / "shards", "data.kind=shards", "training.steps=1", "backbone.options.released=true")
    train(config, root / "run")
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 9})})
    assert do(Job.of(longer, root / "run", start_from=root / "run", fault="terminate")).error == "StoppedBySignal"
    return root / "run", root / "shards"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_way_of_opening_a_run_takes_its_newest_weights(stopped: tuple[Path, Path]) -> None:
    run, _ = stopped
    config = RunConfig.load(run)
    saved = tensors(run, 3)
    newest = {name.removeprefix("average_ema/"): saved[name] for name in saved if name.startswith("average_ema/")}
    assert not same(load_file(run / WEIGHTS_FILE), newest), "the file of the finished run is the older one"
    started, from_run = config.build_network(), config.model_copy(update={"start": str(run), "teacher": str(run)})
    load_start(from_run, started, None)
    teacher = open_teacher(from_run)
    assert teacher is not None
    for network in (sf.load(run).network, started, teacher.network):
        assert same(network.state_dict(), newest)
    assert (sf.load(run).config.step, teacher.config.step) == (3, 3)


def test_a_copied_run_needs_no_data(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    run, shards = stopped
    expected = sf.load(run).sample(torch.ones(2, 1, 8, 8), 1, steps=2)
    copy, hidden = tmp_path / "copy", shards.with_name("hidden")
    shutil.copytree(run, copy)
    shards.rename(hidden)
    try:
        assert torch.equal(sf.load(copy).sample(torch.ones(2, 1, 8, 8), 1, steps=2), expected)
        with pytest.raises(SystemExit) as stop:
            main(["sample", str(copy), "--steps", "1", "--out", str(tmp_path / "samples.png")])
        assert stop.value.code == 0
        (copy / "data.json").write_text('{"shape": "8x8", "num_classes": 10}')
        with pytest.raises(ValueError, match=r"data\.json does not describe"):
            sf.load(copy)
        (copy / "data.json").unlink()
        with pytest.raises(FileNotFoundError, match="so its data says what shape"):
            sf.load(copy)
    finally:
        hidden.rename(shards)


def test_without_checkpoints_the_file_of_weights_is_taken_for_what_it_holds(
    stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(stopped[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert same(sf.load(tmp_path / "run").network.state_dict(), load_file(tmp_path / "run" / WEIGHTS_FILE))
    for weights in ("current", "slow"):
        with pytest.raises(FileNotFoundError, match=f"neither a checkpoint nor .* with '{weights}' weights"):
            sf.load(tmp_path / "run", weights=weights)
