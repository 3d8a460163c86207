"""What the objectives of table 1 are compared on, and how their samples are measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.recipe_run import ROOT, Trained
from recipes import digits, unet_cifar10
from shortcutflow.config import RunConfig

BUDGETS = (128, 4, 1)

Quality = dict[str, dict[str, float]]
"""By budget: the distance to real data, and the share read as the label asked for if there is a reader."""


@dataclass(frozen=True)
class Dataset:
    """A recipe whose data all methods are trained on.

    Attributes:
        title: for the picture.
        recipe: its name; its own steps with its own objective set the compute of every row.
        config: what it gives.
        overrides: of the recipe, for all methods.
        metric: what the table shows, in words.
        reads: whether samples are read by a classifier, too.
        device: that the recipe trains on.
        quality: measures a finished run.
    """

    title: str
    recipe: str
    config: RunConfig
    overrides: tuple[str, ...]
    metric: str
    reads: bool
    device: torch.device
    quality: Callable[[Trained], Quality]


def digits_dataset() -> Dataset:
    """Handwritten digits, measured by the recipe itself when it ends."""

    def quality(trained: Trained) -> Quality:
        return {str(row["steps"]): {"distance": row["fid"], "read": row["label_accuracy"]} for row in trained.rows}

    return Dataset(
        title="Digits: equal training compute, three seeds",
        recipe="digits_paper", config=digits.paper_recipe(), overrides=(f"evaluation.steps={list(BUDGETS)}",),
        metric="Fréchet distance in pixel space of 2,000 samples", reads=True, device=torch.device("cpu"),
        quality=quality,
    )  # fmt: skip


def cifar10_dataset() -> Dataset:
    """CIFAR-10 in pixels, measured by clean-fid against its own statistics of the training pictures."""

    def quality(trained: Trained) -> Quality:
        report = trained.folder / "evaluation-clean-fid.json"
        if not report.exists():
            command = [sys.executable, "-m", "shortcutflow", "evaluate", str(trained.folder), "--metrics", "fid"]
            command += ["--steps", *map(str, BUDGETS), "--samples", "50000", "--out", str(report)]
            subprocess.run(command, check=True, cwd=ROOT)
        rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
        return {str(row["steps"]): {"distance": row["values"]["fid"]} for row in rows}

    return Dataset(
        title="CIFAR-10: equal training compute, three seeds",
        recipe="unet_cifar10", config=unet_cifar10.recipe(), overrides=(),
        metric="FID-50k, protocol clean-fid", reads=False, device=torch.device("cuda"), quality=quality,
    )  # fmt: skip


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits_dataset, "cifar10": cifar10_dataset}
