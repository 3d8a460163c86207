"""Resizing as the published evaluations do it. Most disagreement between two FIDs of one model starts here.

===============  ======================  ==========================  =========  =================
function         filter                  sample i of n out of m is   antialias  result
===============  ======================  ==========================  =========  =================
clean-fid        bicubic (Pillow)        (i + 1/2) m / n - 1/2       yes        float, or 8 bits
bilinear         bilinear (torch, JAX)   (i + 1/2) m / n - 1/2       no         float
tensorflow-1     bilinear (TF 1)         i m / n                     no         float
===============  ======================  ==========================  =========  =================
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shortcutflow.distributed import cores_per_process

MOST_THREADS = 16
Prepare = Callable[[np.ndarray], Tensor]
"""Images (n, h, w, 3) uint8 to a tensor of n rows, on the CPU: what a network's batch starts from."""


def clean_fid_resize(size: int, *, quantize: bool = False) -> Prepare:
    """clean-fid's own function for a batch: (n, h, w, 3) uint8 to (n, 3, size, size) float32 in [0, 255].

    Each image is resized by itself, on as many threads as the process has cores, 16 at most: Pillow lets other threads
    run meanwhile.

    Args:
        size: of the result, in pixels.
        quantize: resize the 8-bit image, as most image pipelines do, instead of its channels as floats.

    Raises:
        ImportError: without clean-fid.
    """
    try:
        from cleanfid.resize import make_resizer
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another torch raises RuntimeError.
        raise ImportError(
            f"the resize is clean-fid's: pip install 'shortcutflow[eval]' ({error}); docs/evaluation.md says what to "
            "do where torchvision and torch do not fit together"
        ) from error
    resize = make_resizer("PIL", quantize, "bicubic", (size, size))

    def prepare(images: np.ndarray) -> Tensor:
        with ThreadPoolExecutor(min(MOST_THREADS, cores_per_process()), thread_name_prefix="resize") as pool:
            resized = np.stack(list(pool.map(resize, images)))
        return torch.from_numpy(resized.astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    return prepare


def unresized(images: np.ndarray) -> Tensor:
    """The images as they are, (n, 3, h, w) uint8: what follows resizes on its device, or not at all."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def plain_bilinear(images: Tensor, size: int) -> Tensor:
    """Bilinear without antialias, pixel centres at i + 1/2: (n, c, h, w) float to (n, c, size, size).

    The same as ``jax.image.resize(..., "bilinear", antialias=False)``.
    """
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=False)


def tensorflow_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's ``resize_bilinear``: no antialias, and pixel centres at i, so the image moves to the top left.

    (n, c, h, w) float to (n, c, size, size).
    """
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = position.long().clamp(max=length - 1)
        weight = (position - low).to(images.dtype).view(-1, *[1] * (3 - dim))
        below, above = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = below + (above - below) * weight
    return images
