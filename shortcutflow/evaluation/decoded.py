"""Samples as pictures: those of latents through their autoencoder."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.data.source import DataInfo

logger = logging.getLogger(__name__)


def as_pictures(samples: Tensor, info: DataInfo) -> Tensor:
    """Pictures (n, 1 or 3, h, w) in [-1, 1] of samples (n, *info.shape).

    Latents whose autoencoder is not at hand are shown as they are, three of their channels at half their size; a
    warning says why, once.
    """
    if info.vae is None:
        return samples
    autoencoder = _autoencoder(info.vae)
    return autoencoder.decode(samples.cpu()) if autoencoder is not None else samples[:, :3] / 2


@cache
def _autoencoder(name: str) -> Autoencoder | None:
    try:
        return load_autoencoder(name)
    except (OSError, ImportError, ValueError) as error:
        logger.warning("latents are shown as they are, not as images: %s", error)
        return None
