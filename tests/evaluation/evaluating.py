"""Small things to evaluate, and evaluations in other processes: ``python -m tests.evaluation.evaluating JSON``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.digits import recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.digits import DigitsData
from shortcutflow.data.source import DataInfo
from shortcutflow.distributed import joined
from shortcutflow.evaluation.evaluate import evaluate
from shortcutflow.evaluation.features.protocols import open_protocol
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.evaluation.subject import Subject, subject_of_run
from shortcutflow.run_dir import load_run


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


class Plain:
    """A network of sums and products: the same to the last bit in every batch.

    Args:
        pause: seconds that a call takes.
        shift: another one makes other pictures.
    """

    def __init__(self, pause: float = 0.0, shift: float = 0.0) -> None:
        self.pause, self.shift, self.calls = pause, shift, 0

    def __call__(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        """Smaller noise, lighter by the label."""
        time.sleep(self.pause)
        self.calls += 1
        light = 0.0 if y is None else (y.view(-1, 1, 1, 1) / 10 - 0.5)
        return -0.5 * x + light + self.shift


def plain_subject(
    *, network: Any = None, shape: tuple[int, ...] = (1, 8, 8), num_classes: int | None = 10, **changes: Any
) -> Subject:
    """Such a network, as if trained on the digits."""
    settings: dict[str, Any] = {
        "name": "plain", "network": network or Plain(), "info": DataInfo(shape, num_classes),
        "device": torch.device("cpu"), "identity": {"network": "plain"}, "null_y": num_classes, "data": DigitsData(),
    }  # fmt: skip
    return Subject(**settings | changes)


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
        subject = subject_of_run(load_run(Path(self.run))) if self.run else plain_subject(network=Plain(self.pause))
        sampler = Sampler(subject, batch_size=self.batch_size)
        with joined("cpu") as world:
            return evaluate(
                sampler, open_protocol(self.protocol), Path(self.out), steps=self.steps, metrics=self.metrics,
                samples=self.samples, images=Path(self.images) if self.images else None,
                keep_features=self.keep_features, world=world,
            )  # fmt: skip


def command(*jobs: Job, processes: int | None = None) -> list[str]:
    """The command that does them, one after the other, in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    what = json.dumps([asdict(job) for job in jobs])
    return [sys.executable, *(torchrun if processes else []), "-m", "tests.evaluation.evaluating", what]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for described in json.loads(sys.argv[1]):
        settings: dict[str, Any] = described | {name: tuple(described[name]) for name in ("metrics", "steps")}
        Job(**settings).do()
