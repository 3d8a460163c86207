"""Images while training, from the same noise and data each time: samples, reconstructions and interpolations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shortcutflow.config import RunConfig
from shortcutflow.data.source import DataInfo
from shortcutflow.evaluation import plots
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.evaluation.generate import generate, initial_noise, noise_of
from shortcutflow.evaluation.sample_grid import image_grid, save_image
from shortcutflow.models.config import config_of_run
from shortcutflow.models.model import Model

SAMPLES = 10
RECONSTRUCTIONS, RECONSTRUCTION_COLUMNS = 2, 5
"""Real samples and times. These and the next are small because decoding latents takes long."""
PAIRS, PAIR_COLUMNS = 2, 7
"""Pairs of noises, and samples from one noise of a pair to the other."""


def grid_file(run_dir: Path, step: int) -> Path:
    """Where the samples of a step are kept in the run's folder."""
    return run_dir / "grids" / f"step_{step:08d}.png"


def shows_grid(config: RunConfig, info: DataInfo, done: int) -> bool:
    """Whether to show samples after so many steps: at the end, and as often as the config says."""
    settings = config.training
    is_due = done == settings.steps or (settings.grid_every > 0 and done % settings.grid_every == 0)
    return is_due and info.is_picture


def visualize(
    config: RunConfig,
    info: DataInfo,
    network: nn.Module,
    device: torch.device,
    decoder: ImageDecoder | None,
    grid: Path,
) -> dict[str, np.ndarray]:
    """Sample the network and draw it: "samples", "reconstruction" and "interpolation", each (height, width, 3) uint8.

    Reconstruction and interpolation cost three evaluations of the network, little compared with the samples.

    Args:
        config: the run.
        info: shape and classes of its data.
        network: with the weights to show. Where it is sharded, every process must call this.
        device: of the network.
        decoder: all samples are decoded in one call of it. None samples without drawing, and returns nothing.
        grid: the file in which the samples are kept.
    """
    described = config_of_run(config, info, weights=config.sample_weights, step=None)
    model = Model(network, described, config.sample_weights, grid.parent, config.name)
    noise, labels = initial_noise(model, count=SAMPLES, seed=config.seed)
    real = config.data.first(RECONSTRUCTIONS, seed=config.seed)
    y = None if real.y is None else real.y.to(device)
    ends, pair_labels = initial_noise(model, count=PAIRS, noises_per_label=2, seed=config.seed)
    with _eval_mode(network, device, bfloat16=config.training.precision == "bfloat16"):
        samples = [generate(model, noise, labels, steps=steps) for steps in config.training.grid_steps]
        t, rows = plots.reconstruction_rows(
            model, real.data.to(device), noise_of(config.seed, RECONSTRUCTIONS, info.shape, device), y,
            columns=RECONSTRUCTION_COLUMNS,
        )  # fmt: skip
        between = plots.interpolated_samples(model, ends, pair_labels, columns=PAIR_COLUMNS, seed=config.seed)
    if decoder is None:
        return {}
    between, *images = decoder(between, *samples, *rows.values())
    rows = dict(zip(rows, images[len(samples) :], strict=True))
    pixels = image_grid(images[: len(samples)], [f"{steps}" for steps in config.training.grid_steps])
    grid.parent.mkdir(exist_ok=True)
    save_image(pixels, grid)
    return {
        "samples": pixels,
        "reconstruction": plots.x1_image(t, rows, y, title=plots.RECONSTRUCTION_TITLE, with_step_size=True),
        "interpolation": plots.interpolation_image({1: between}, pair_labels),
    }


@contextmanager
def _eval_mode(network: nn.Module, device: torch.device, *, bfloat16: bool) -> Iterator[None]:
    """The network is in eval mode, and computes in the precision of training."""
    was_training = network.training
    # Units of a sharded network then hold bfloat16 weights, which only autocast can use.
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        network.eval()
        try:
            yield
        finally:
            network.train(was_training)
