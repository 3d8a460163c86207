"""A logger as another package adds it: Weights & Biases, with a stand-in for ``wandb``, and one passed as an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from recipes.digits import paper_recipe as recipe
from shortcutflow.cli import launch
from shortcutflow.config import with_overrides
from shortcutflow.train.loggers import read_metrics
from shortcutflow.train.loop import train


class wandb:
    """What the logger below uses of the package."""

    runs: ClassVar[list[dict[str, Any]]] = []

    class Image:
        def __init__(self, pixels: np.ndarray) -> None:
            self.pixels = pixels

    @classmethod
    def init(cls, **settings: Any) -> type[wandb]:
        cls.runs.append({"settings": settings, "log": [], "finished": False})
        return cls

    @classmethod
    def log(cls, values: dict[str, Any], step: int) -> None:
        cls.runs[-1]["log"].append((step, values))

    @classmethod
    def finish(cls) -> None:
        cls.runs[-1]["finished"] = True


class WandB:
    """The whole logger."""

    def __init__(self, config: Any, run_dir: Path, step: int) -> None:
        self.run = wandb.init(project=config.name, id=run_dir.name, resume="allow", config=config.model_dump())

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def images(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Printed:
    """A logger of a notebook."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.lines.append(f"{step}: loss {values['loss']:.3f}")

    def images(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.lines.append(f"{step}: {name}")

    def close(self) -> None:
        self.lines.append("closed")


SMALL = (
    "training.global_batch_size=32", "training.log_every=10", "training.checkpoint_every=20", "training.grid_steps=[1]",
    "backbone.options.width=16", "backbone.options.depth=1", "backbone.options.heads=2", "evaluation=null",
)  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, as pip leaves it."""
    info = tmp_path / "site" / "wandb_logger-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb-logger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[shortcutflow.loggers]\nwandb = {__name__}:WandB\n")
    monkeypatch.syspath_prepend(str(info.parent))
    wandb.runs.clear()


def test_a_run_that_names_it_logs_to_it(tmp_path: Path, installed: None) -> None:
    printed = Printed()
    for steps, resume in ((20, False), (30, True)):
        overrides = [*SMALL, f"training.steps={steps}", 'training.loggers=["wandb"]', f"data.folder={tmp_path}/digits"]
        config = with_overrides(recipe(), overrides)
        train(config, tmp_path / "run", resume=resume, loggers=[printed])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert not (tmp_path / "run" / "tensorboard").exists(), "the config names another logger"
    first, second = wandb.runs
    assert [each["finished"] for each in wandb.runs] == [True, True]
    assert second["settings"]["id"] == first["settings"]["id"] == "run"
    json.dumps(first["settings"]["config"], default=str)
    logged = [(step, values) for each in (first, second) for step, values in each["log"]]
    numbers = [{"step": step, **values} for step, values in logged if "loss" in values]
    assert numbers == [{name: line[name] for name in number} for line, number in zip(lines, numbers, strict=True)]
    images = {name: value.pixels for _, values in logged for name, value in values.items() if name not in lines[0]}
    assert "samples" in images
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in images.values())
    assert printed.lines[0] == f"10: loss {lines[0]['loss']:.3f}"
    assert printed.lines.count("closed") == 2


def test_an_unknown_logger_is_refused_before_anything_is_written(tmp_path: Path, installed: None) -> None:
    config = with_overrides(recipe(), ['training.loggers=["wanbd"]', f"data.folder={tmp_path}/digits"])
    with pytest.raises(ValueError, match=r"'wanbd'.*tensorboard, wandb"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_logger_is_closed_when_the_run_fails(tmp_path: Path) -> None:
    class Failing(Printed):
        def numbers(self, step: int, values: dict[str, float]) -> None:
            raise ConnectionError("no network")

    failing = Failing()
    overrides = [*SMALL, "training.loggers=[]", "training.steps=20", f"data.folder={tmp_path}/digits"]
    with pytest.raises(ConnectionError):
        train(with_overrides(recipe(), overrides), tmp_path / "run", loggers=[failing])
    assert failing.lines == ["closed"]


def test_a_recipe_file_passes_its_own_logger(tmp_path: Path) -> None:
    printed = Printed()
    config = with_overrides(recipe(), ["evaluation=null", "training.loggers=[]", f"data.folder={tmp_path}/digits"])
    with pytest.raises(SystemExit) as ended:
        launch(config, ["--smoke", "--run-dir", str(tmp_path / "run")], loggers=[printed])
    assert ended.value.code == 0
    assert printed.lines[0].startswith("1: loss ")
    assert printed.lines[-1] == "closed"
