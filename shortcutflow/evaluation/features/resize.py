"""Resizing as the published evaluations do it. Most disagreement between two FIDs of one model starts here.

===============  ======================  ==========================  =========  =================
function         filter                  sample i of n out of m is   antialias  result
===============  ======================  ==========================  =========  =================
clean_fid        bicubic (Pillow)        (i + 1/2) m / n - 1/2       yes        float, or 8 bits
plain_bilinear   bilinear (torch, JAX)   (i + 1/2) m / n - 1/2       no         float
tensorflow_1     bilinear (TF 1)         i m / n                     no         float
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

MOST_WORKERS = 16
Prepare = Callable[[np.ndarray], Tensor]
"""Images (n, h, w, 3) uint8 to a tensor of n rows, on the CPU: what a network's batch starts from."""


def clean_fid_resize(size: int, *, quantize: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """clean-fid's own function for one image: (h, w, 3) uint8 to (size, size, 3) float32 in [0, 255].

    Args:
        size: of the result, in pixels.
        quantize: resize the 8-bit picture, as most image pipelines do, instead of its channels as floats.

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
    return lambda image: np.asarray(resize(image), np.float32)


def on_threads(resize: Callable[[np.ndarray], np.ndarray], workers: int) -> Prepare:
    """For a batch: (n, h, w, 3) uint8 to (n, 3, size, size) float32, each image by itself on one of the threads.

    Pillow lets other threads run while it resizes.
    """

    def resize_all(images: np.ndarray) -> Tensor:
        if workers == 1:
            resized = [resize(image) for image in images]
        else:
            with ThreadPoolExecutor(workers, thread_name_prefix="resize") as pool:
                resized = list(pool.map(resize, images))
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()

    return resize_all


def default_workers() -> int:
    """Threads that resize: the cores this process may use, shared with the other processes that torchrun started."""
    return min(MOST_WORKERS, cores_per_process())


def unresized(images: np.ndarray) -> Tensor:
    """The images as they are, (n, 3, h, w) uint8: what follows resizes on its device, or not at all."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def plain_bilinear(images: Tensor, size: int) -> Tensor:
    """Bilinear without antialias, pixel centres at i + 1/2: (n, c, h, w) float to (n, c, size, size).

    The same as ``jax.image.resize(..., "bilinear", antialias=False)``.
    """
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=False)


def tensorflow_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's ``resize_bilinear``: no antialias, and pixel centres at i, so the picture moves to the top left.

    (n, c, h, w) float to (n, c, size, size).
    """
    return _tensorflow_lines(_tensorflow_lines(images, size, dim=3), size, dim=2)


def _tensorflow_lines(x: Tensor, size: int, dim: int) -> Tensor:
    length = x.shape[dim]
    place = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
    low = place.long().clamp(max=length - 1)
    shape = [1] * x.ndim
    shape[dim] = size
    share = (place - low).view(shape).to(x.dtype)
    below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
    return below + (above - below) * share
