"""An evaluation at the end of training as another package adds it: are samples nearest to the mean of their class?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import torch
from torch import Tensor

from recipes.digits import paper_recipe as recipe
from shortcutflow.config import EvaluationSettings, RunConfig
from shortcutflow.data.digits import DigitsData
from shortcutflow.data.source import DataInfo, DataSource
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.launch import Options, run_recipe
from shortcutflow.models.model import Model
from tests.evaluation.evaluating import model_of


class NearestMeans(EvaluationSettings):
    """The share of samples that lie nearest to the mean of their label's class.

    Args:
        steps: numbers of steps of the sampler.
        samples: how many for each.
    """

    kind: Literal["nearest_means"] = "nearest_means"
    steps: tuple[int, ...] = (1, 4, 128)
    samples: int = 1000

    def check(self, config: RunConfig) -> None:
        if config.data.describe().num_classes is None:
            raise ValueError("evaluation 'nearest_means' needs data with labels: use evaluation=null")

    def smoke(self) -> Self:
        return self.model_copy(update={"steps": (1, 4), "samples": 20})

    def run(self, model: Model, config: RunConfig) -> dict[str, Any]:
        means = class_means(config.data, model.info.num_classes or 0)
        noise = noise_of(config.seed, self.samples, model.shape, model.device)
        labels = labels_of(self.samples, model.num_classes, model.device)
        rows = []
        for steps in self.steps:
            samples = generate(model, noise, labels, steps=steps)
            is_nearest = torch.cdist(samples.flatten(1).cpu(), means).argmin(1) == labels.cpu()
            rows.append({"steps": steps, "values": {"nearest_mean": float(is_nearest.double().mean())}})
        description = "share of samples nearest to the mean of the real ones with their label, by pixels"
        return {"protocol": {"name": self.kind, "description": description}, "samples": self.samples, "rows": rows}


def class_means(data: DataSource, classes: int) -> Tensor:
    """Of the real samples, (classes, values of a sample)."""
    sums, counts = torch.zeros(classes, 1), torch.zeros(classes, 1)
    for batch in data.one_epoch(batch_size=512):
        chosen = torch.nn.functional.one_hot(batch.y, classes).float().T
        sums, counts = sums + chosen @ batch.data.flatten(1), counts + chosen.sum(1, keepdim=True)
    return sums / counts


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, as pip leaves it."""
    info = tmp_path / "site" / "nearest_means-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-means\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[shortcutflow.evaluations]\nnearest_means = {__name__}:NearestMeans\n")
    monkeypatch.syspath_prepend(str(info.parent))


def test_a_run_that_names_it_is_measured_by_it(tmp_path: Path, installed: None, capsys: Any) -> None:
    overrides = ["evaluation.kind=nearest_means", "evaluation.samples=50", f"data.folder={tmp_path}/digits"]
    overrides += ["backbone.options.width=16", "backbone.options.depth=1", "training.grid_steps=[1]"]
    run_recipe(recipe(), overrides, Options(run_dir=tmp_path / "run", smoke=True))
    assert isinstance(RunConfig.load(tmp_path / "run").evaluation, NearestMeans)
    report = json.loads((tmp_path / "run" / "evaluation-nearest_means.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [1, 4]
    assert all(0 <= row["values"]["nearest_mean"] <= 1 for row in report["rows"])
    assert (report["subject"]["name"], report["subject"]["step"], report["samples"]) == ("digits_paper", 4, 50)
    assert f"{report['rows'][0]['values']['nearest_mean']:.4f}" in capsys.readouterr().out


def test_it_tells_digits_from_noise(tmp_path: Path) -> None:
    data = DigitsData(folder=tmp_path / "digits")
    real = next(data.one_epoch(batch_size=1797))
    of_class = [real.data[real.y == label] for label in range(10)]

    def digits(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor) -> Tensor:
        return torch.stack([of_class[label][i] for i, label in enumerate(y.tolist())]) - x_t

    config = recipe().model_copy(update={"data": data})
    settings, info = NearestMeans(steps=(1,), samples=150), DataInfo((1, 8, 8), 10)
    shares = [
        settings.run(model_of(network, info), config)["rows"][0]["values"]["nearest_mean"]
        for network in (digits, lambda x_t, *_: 0 * x_t)
    ]
    assert shares[0] > 0.85
    assert shares[1] < 0.25


class Unlabelled(DigitsData):
    kind: Literal["unlabelled"] = "unlabelled"  # type: ignore[assignment]

    def describe(self) -> DataInfo:
        return DataInfo((1, 8, 8), None)


def test_data_without_labels_is_refused_before_training(tmp_path: Path) -> None:
    config = recipe().model_copy(update={"evaluation": NearestMeans(), "data": Unlabelled(folder=tmp_path / "digits")})
    with pytest.raises(ValueError, match="'nearest_means' needs data with labels"):
        run_recipe(config, [], Options(run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
