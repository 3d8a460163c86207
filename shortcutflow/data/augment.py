"""What differs between two visits of a sample: its mirror image or not, and the draw of its latent.

Both are functions of (seed, epoch, sample), so neither the number of processes nor a restart changes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shortcutflow.data.autoencoder import draw_latents
from shortcutflow.data.manifest import Manifest
from shortcutflow.seeds import seed_for


class Draws(NamedTuple):
    """Of each sample of a batch: a seed (0 where nothing is drawn), and whether it is mirrored."""

    seeds: list[int]
    mirrored: list[bool]


class Augmentation:
    """Flips and latent draws for the samples of one manifest.

    Args:
        manifest: of the samples.
        seed: of the draws.
        horizontal_flip: mirror each sample with probability 1/2.

    Raises:
        ValueError: if samples are to be mirrored and are no images, or latents without their mirror images.
    """

    def __init__(self, manifest: Manifest, *, seed: int, horizontal_flip: bool) -> None:
        self._manifest, self._seed, self._flips = manifest, seed, horizontal_flip
        if horizontal_flip and manifest.values == "float32":
            raise ValueError("horizontal_flip is for images; these shards hold arrays of numbers")
        if horizontal_flip and manifest.latents is not None and not manifest.latents.mirrored:
            raise ValueError(
                "horizontal_flip needs the latents of the mirror images: prepare the latents with them, or set "
                "data.horizontal_flip=false"
            )

    @property
    def bytes_per_sample(self) -> int:
        """In memory, with all its copies."""
        numbers = math.prod(self._manifest.shape)
        width = {"uint8": 1, "float32": 4, "moments": 4 * (1 + self._flips)}[self._manifest.values]
        return numbers * width + 4 * math.prod(self._manifest.condition_shape or (0,))

    def draw(self, epochs: np.ndarray, samples: np.ndarray) -> Draws:
        """The draws for samples (b,), by their number in the whole data set, in epochs (b,)."""
        if not self._flips and self._manifest.values != "moments":
            return Draws([0] * len(samples), [False] * len(samples))
        visits = zip(epochs.tolist(), samples.tolist(), strict=True)
        seeds = [seed_for(self._seed, "variation", step=epoch, index=sample) for epoch, sample in visits]
        # The flip is the highest of the seed's 63 bits; a CPU generator goes by the lower 32.
        return Draws(seeds, [self._flips and seed >> 62 == 1 for seed in seeds])

    def copies(self, draws: Draws) -> list[int]:
        """Which stored copy of each sample to read: of latents, the mirror image is one."""
        return [int(mirrored) if self._manifest.values == "moments" else 0 for mirrored in draws.mirrored]

    def apply(self, values: Sequence[np.ndarray], draws: Draws) -> Tensor:
        """The batch (b, *shape): uint8 pixels, or float32."""
        if self._manifest.values == "uint8":
            # Decoded images have their channels last in memory, and are copied so; the device puts them first.
            stacked = np.stack([np.moveaxis(image, 0, -1) for image in values])
            if any(draws.mirrored):
                stacked[draws.mirrored] = stacked[draws.mirrored][:, :, ::-1]
            return torch.from_numpy(stacked).permute(0, 3, 1, 2)
        batch = torch.from_numpy(np.stack(values))
        if (info := self._manifest.latents) is None:
            return batch
        noise, generator = torch.empty(len(values), *self._manifest.shape), torch.Generator()
        for row, seed in zip(noise, draws.seeds, strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return draw_latents(batch, noise, info.scaling_factor, info.shift_factor)
