"""Pictures while training, from the same fixed noise each time: samples of every budget, and what explains them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shortcutflow.config import RunConfig
from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.drawing.ends import Ends
from shortcutflow.evaluation.drawing.grids import sample_grid, save_picture
from shortcutflow.evaluation.drawing.interpolation import interpolate_samples, interpolation_picture
from shortcutflow.evaluation.drawing.predictor import Predictor
from shortcutflow.evaluation.drawing.real import some_data
from shortcutflow.evaluation.drawing.reconstruction import reconstruct, reconstruction_picture
from shortcutflow.evaluation.drawing.starts import pairs_of
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.types import Batch

SAMPLES = 10
RECONSTRUCTED, RECONSTRUCTION_COLUMNS = 2, 5
"""Real samples, and times. These and the next are small because latents are decoded one by one."""
PAIRS, PAIR_COLUMNS = 2, 7
"""Of noises, and samples from one noise to the other."""


class Made(NamedTuple):
    """What is drawn after some steps.

    Attributes:
        grid: samples, a row a budget.
        real: data, with labels that are None or (n,).
        ends: the data with noise on it, and where the network sends that.
        between: one-step samples (pairs, columns, *shape) between two noises.
        pair_labels: (pairs,) or None.
    """

    grid: list[Tensor]
    real: Batch
    ends: Ends
    between: Tensor
    pair_labels: Tensor | None


def shows_grid(config: RunConfig, done: int) -> bool:
    """Whether samples are shown after so many steps: at the end, and as often as the config says."""
    settings = config.training
    its_time = done == settings.steps or (settings.grid_every > 0 and done % settings.grid_every == 0)
    return its_time and config.data.describe().is_picture


def training_pictures(config: RunConfig, network: nn.Module, device: torch.device) -> Made:
    """Ask the network for everything that is drawn; every process must call it where the network is sharded.

    Reconstruction and interpolation cost three evaluations of the network, little beside the grid.
    """
    info = config.data.describe()
    noise = noise_of(config.seed, RECONSTRUCTED, info.shape, device)
    real = some_data(config.data, RECONSTRUCTED, seed=config.seed)
    real = Batch(real.data.to(device), None if real.y is None else real.y.to(device), real.keys)
    pairs, pair_labels = pairs_of(info, pairs=PAIRS, seed=config.seed, device=device)
    predictor = Predictor(network, **config.sampler_options())
    with _asked(config, network, device):
        grid = _grid(config, network, device)
        ends = reconstruct(predictor, real.data, noise, real.y, most_columns=RECONSTRUCTION_COLUMNS)
        between = interpolate_samples(predictor, pairs, pair_labels, columns=PAIR_COLUMNS, seed=config.seed)
    return Made(grid, real, ends, between, pair_labels)


def save_pictures(
    config: RunConfig, made: Made, run_dir: Path, step: int, decoder: ImageDecoder
) -> dict[str, np.ndarray]:
    """Draw all of it, save the samples in the run's folder, and give the pictures by name, (height, width, 3) uint8.

    Everything is decoded in one call of the decoder.
    """
    budgets = len(made.grid)
    between, *images = decoder(made.between, *made.grid, *made.ends.groups())
    return {
        "samples": _save_grid(config, images[:budgets], run_dir, step),
        "reconstruction": reconstruction_picture(made.ends.with_groups(images[budgets:]), made.real.y),
        "interpolation": interpolation_picture({1: between}, made.pair_labels),
    }


def _grid(config: RunConfig, network: nn.Module, device: torch.device) -> list[Tensor]:
    info = config.data.describe()
    noise, labels = noise_of(config.seed, SAMPLES, info.shape, device), labels_of(SAMPLES, info.num_classes, device)
    return [
        generate(network, noise, labels, steps=steps, **config.sampler_options())
        for steps in config.training.grid_steps
    ]


@contextmanager
def _asked(config: RunConfig, network: nn.Module, device: torch.device) -> Iterator[None]:
    """The network is in eval mode, and computes as in training."""
    was_training = network.training
    bfloat16 = config.training.precision == "bfloat16"
    # As in training: units of a sharded network then hold bfloat16 weights, which only autocast can use.
    with torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext():
        network.eval()
        try:
            yield
        finally:
            network.train(was_training)


def _save_grid(config: RunConfig, rows: list[Tensor], run_dir: Path, step: int) -> np.ndarray:
    """Draw rows of images, save the picture in the run's folder and give it, (height, width, 3) uint8."""
    picture = sample_grid(rows, [f"{steps}" for steps in config.training.grid_steps])
    folder = run_dir / "grids"
    folder.mkdir(exist_ok=True)
    save_picture(picture, str(folder / f"step_{step:08d}.png"))
    return picture
