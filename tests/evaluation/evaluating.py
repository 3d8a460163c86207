"""Small things to evaluate, and evaluations for other processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.digits import paper_recipe as recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.digits import DigitsData
from shortcutflow.data.source import DataInfo, DataSource
from shortcutflow.distributed import joined
from shortcutflow.evaluation.evaluate import evaluate
from shortcutflow.evaluation.features.protocols import open_protocol
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.config import ModelConfig
from shortcutflow.models.model import Model, load
from shortcutflow.network import BackboneConfig


def small_run(folder: Path) -> RunConfig:
    """A run of 20 steps on the digits, with shards of its own."""
    return with_overrides(
        recipe(),
        [
            "training.steps=20", "training.grid_every=0", "training.grid_steps=[1]", "training.global_batch_size=16",
            "backbone.options.width=16", "backbone.options.depth=1", "backbone.options.heads=2", "evaluation=null",
            f"data.folder={folder / 'digits'}", "data.workers=0",
        ],
    )  # fmt: skip


DIGITS_INFO = DataInfo((1, 8, 8), 10)


class Plain(torch.nn.Module):
    """A network of sums and products: the same to the last bit in every batch.

    Args:
        pause: seconds that a call takes.
        shift: another one makes other pictures.
    """

    def __init__(self, pause: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        self.pause, self.shift, self.calls = pause, shift, 0

    def forward(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        """Smaller noise, lighter by the label."""
        time.sleep(self.pause)
        self.calls += 1
        light = 0.0 if y is None else (y.view(-1, 1, 1, 1) / 10 - 0.5)
        return -0.5 * x + light + self.shift


class Called(torch.nn.Module):
    """Any function of (x_t, t, d, y) as a network."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        return self.function(x_t, t, d, y)


def model_of(function: Any, info: DataInfo, *, data: DataSource | None = None, **options: Any) -> Model:
    """A model whose network is a module or any function of (x_t, t, d, y)."""
    config = ModelConfig(
        backbone=BackboneConfig(name="plain"), weights=("current",), default_weights="current", **info._asdict(),
        **options,
    )  # fmt: skip
    network = function if isinstance(function, torch.nn.Module) else Called(function)
    return Model(network, config, "current", Path("plain"), "plain", data)


def plain_model(
    *, network: Any = None, info: DataInfo = DIGITS_INFO, data: DataSource | None = None, **options: Any
) -> Model:
    """A plain network, as if trained on the digits."""
    return model_of(network or Plain(), info, data=data or DigitsData(), **{"null_y": info.num_classes} | options)


@dataclass(frozen=True)
class Job:
    """An evaluation.

    Attributes:
        out: the report.
        run: a run's folder; None for a plain network.
        protocol: its name.
        metrics, steps, samples, keep_features: see :func:`evaluate`.
        batch_size: samples at once.
        images: a folder for them.
        pause: seconds that a call of the plain network takes.
    """

    out: str
    run: str | None = None
    protocol: str = "pixels"
    metrics: tuple[str, ...] = ("fid",)
    steps: tuple[int, ...] = (1,)
    samples: int = 200
    keep_features: bool = False
    batch_size: int = 64
    images: str | None = None
    pause: float = 0.0

    def do(self) -> dict[str, Any] | None:
        """Evaluate in this process, with the others of its kind if torchrun has started it."""
        model = load(self.run) if self.run else plain_model(network=Plain(self.pause))
        sampler = Sampler(model, batch_size=self.batch_size)
        with joined("cpu") as world:
            return evaluate(
                sampler, open_protocol(self.protocol), Path(self.out), steps=self.steps, metrics=self.metrics,
                samples=self.samples, images=Path(self.images) if self.images else None,
                keep_features=self.keep_features, world=world,
            )  # fmt: skip


def do_all(*jobs: Job) -> None:
    """One after the other."""
    for job in jobs:
        job.do()
