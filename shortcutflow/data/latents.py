"""Latents in place of images: ``shortcutflow prepare --latents``.

What is stored of an image, and of its mirror image, are the moments that the autoencoder returns: mean and log-variance
in float16, 32 KiB together at 256 pixels. Training draws a new latent from them at every visit, and never encodes.

Numbers are float32 until they are stored, without autocast; whether a GPU's convolutions round to TF32 is left to
torch's own switch. The same device, versions and number of threads give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.data.manifest import LatentsInfo
from shortcutflow.data.prepare import CROPS, Encoder, PrepareOptions


class LatentOptions(PrepareOptions):
    """What decides about the content of the shards; ``batch_size`` too, since it may change the last bits."""

    batch_size: int = Field(default=32, ge=1, description="images encoded at once")
    mirror: bool = Field(default=True, description="keep the moments of the mirror image too")
    vae_sha256: str = Field(description="of the autoencoder's weights, wherever they lie")


def latent_encoder(vae: str | Path, device: torch.device, **options: Any) -> Encoder:
    """Moments by an autoencoder.

    Args:
        vae: hub id or folder, see :func:`~shortcutflow.data.autoencoder.load_autoencoder`.
        device: it computes on.
        options: of :class:`LatentOptions`.

    Raises:
        ValueError: for an option that is wrong, or a size that does not fit the autoencoder.
    """
    autoencoder = load_autoencoder(vae, device=device)
    chosen = LatentOptions.checked(**options, vae_sha256=autoencoder.sha256)
    manifest = {
        "shape": autoencoder.latent_shape(chosen.size), "values": "moments", "format": "npy",
        "latents": LatentsInfo(
            vae=autoencoder.name, sha256=autoencoder.sha256, scaling_factor=autoencoder.scaling_factor,
            shift_factor=autoencoder.shift_factor, mirrored=chosen.mirror,
        ),
        "preprocessing": f"{CROPS[chosen.crop]}; {chosen.size}x{chosen.size} RGB; moments by {autoencoder.name}",
    }  # fmt: skip

    def encode(pixels: list[np.ndarray], names: list[str]) -> np.ndarray:
        return encode_images(autoencoder, np.stack(pixels), names, mirror=chosen.mirror)

    return Encoder(chosen, ("shortcutflow", "pillow", "torch", "diffusers"), manifest, encode, chosen.batch_size)


def encode_images(autoencoder: Autoencoder, pixels: np.ndarray, names: Sequence[str], *, mirror: bool) -> np.ndarray:
    """Moments (b, copies, 2 channels, h, w) float16 of images (b, 3, size, size) uint8; copy 1 is the mirror image.

    Raises:
        ValueError: naming the image, if a number does not fit float16.
    """
    images = torch.from_numpy(pixels).to(autoencoder.device).float() / 127.5 - 1
    copies = [images, images.flip(-1)] if mirror else [images]
    exact: Tensor = torch.stack([autoencoder.encode(copy) for copy in copies], dim=1)
    moments = exact.half()
    fits = moments.isfinite().flatten(1).all(dim=1).tolist()
    if not all(fits):
        first = fits.index(False)
        raise ValueError(
            f"the latent of {names[first]} reaches {exact[first].abs().max().item():.3g}, outside the range of float16 "
            f"(65504): autoencoder {autoencoder.name} does not fit this image"
        )
    return moments.cpu().numpy()
