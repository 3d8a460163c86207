"""Sample grids while training: every budget from the same fixed noise."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shortcutflow.config import RunConfig
from shortcutflow.evaluation.decoded import as_pictures
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.grids import sample_grid, save_picture

SAMPLES = 10


def shows_grid(config: RunConfig, done: int) -> bool:
    """Whether samples are shown after so many steps: at the end, and as often as the config says."""
    settings = config.training
    its_time = done == settings.steps or (settings.grid_every > 0 and done % settings.grid_every == 0)
    return its_time and config.data.describe().is_picture


def training_grid(config: RunConfig, network: nn.Module, device: torch.device) -> list[Tensor]:
    """Samples, a row a budget; every process must call it where the network is sharded."""
    info = config.data.describe()
    noise, labels = noise_of(config.seed, SAMPLES, info.shape, device), labels_of(SAMPLES, info.num_classes, device)
    was_training = network.training
    network.eval()
    bfloat16 = config.training.precision == "bfloat16"
    # As in training: units of a sharded network then hold bfloat16 weights, which only autocast can use.
    with torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext():
        rows = [
            generate(network, noise, labels, steps=steps, **config.sampler_options())
            for steps in config.training.grid_steps
        ]
    network.train(was_training)
    return rows


def save_grid(config: RunConfig, rows: list[Tensor], run_dir: Path, step: int) -> np.ndarray:
    """Draw rows of samples, save the picture in the run's folder and give it, (height, width, 3) uint8."""
    info = config.data.describe()
    rows = [as_pictures(row, info) for row in rows]
    picture = sample_grid(rows, [f"{steps}" for steps in config.training.grid_steps])
    folder = run_dir / "grids"
    folder.mkdir(exist_ok=True)
    save_picture(picture, str(folder / f"step_{step:08d}.png"))
    return picture
