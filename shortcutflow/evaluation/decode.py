"""Samples as images: latents are decoded by their autoencoder, all others are images already."""

from __future__ import annotations

import logging
from functools import cached_property

import torch
from torch import Tensor

from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.data.source import DataInfo

BATCH_SIZE = 8
"""Latents decoded at once: 256x256 images need about 3 GB of activations, beside a network in training."""
logger = logging.getLogger(__name__)


class ImageDecoder:
    """Turns samples into images; the autoencoder is loaded at the first use and freed with this object.

    Args:
        info: of the samples.
        device: where latents are decoded.
    """

    def __init__(self, info: DataInfo, device: torch.device | str) -> None:
        self._info, self._device = info, device

    @cached_property
    def _autoencoder(self) -> Autoencoder | None:
        assert self._info.vae is not None
        try:
            return load_autoencoder(self._info.vae, expect=self._info.latents, device=self._device)
        except (OSError, ImportError, ValueError) as error:
            logger.warning("latents are shown as they are, not as images: %s", error)
            return None

    def __call__(self, *groups: Tensor) -> list[Tensor]:
        """Images (..., 1 or 3, h, w) in [-1, 1] of each group of samples (..., *info.shape).

        All groups are decoded together, and equal latents once. Latents whose autoencoder is not available are shown
        as they are, three of their channels at half their size; a warning says why, once.
        """
        if self._info.vae is None:
            return list(groups)
        if self._autoencoder is None:
            return [group[..., :3, :, :] / 2 for group in groups]
        flat = torch.cat([group.to(self._device, torch.float32).flatten(0, -4) for group in groups])
        distinct, rows = flat.unique(dim=0, return_inverse=True)
        images = self._autoencoder.decode(distinct, batch_size=BATCH_SIZE)[rows]
        parts = images.split([group[..., 0, 0, 0].numel() for group in groups])
        return [part.unflatten(0, group.shape[:-3]) for part, group in zip(parts, groups, strict=True)]
