"""The squared error of a row by bands of frequency, as iSM weighs it (arXiv 2510.21250)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor


def wavelet_error(error: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean square of an orthonormal Haar transform of each row's error over its last two axes, (r,).

    The details of a level are what is lost where the mean of 2 x 2 numbers takes their place, so the squares of a band
    add up to a difference of two sums of squares, and no coefficient is computed.

    Args:
        error: (r, *shape), the last two axes divisible by 2^L.
        weights: of L + 1 bands: the approximation, the coarsest details, ..., the finest. All 1 is the mean square.

    Raises:
        ValueError: for axes that 2^L does not divide.
    """
    block = 2 ** (len(weights) - 1)
    if error.ndim < 3 or error.shape[-1] % block or error.shape[-2] % block:
        raise ValueError(
            f"wavelet_weights of {len(weights)} bands make {len(weights) - 1} levels, for samples whose last two axes "
            f"{block} divides; these have shape {tuple(error.shape[1:])}"
        )
    total = weights[-1] * error.square().flatten(1).sum(1)
    approximation = error
    for finer, weight in pairwise(reversed(weights)):
        blocks = approximation.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        approximation = blocks.sum((-3, -1)) / 2
        total = total + (weight - finer) * approximation.square().flatten(1).sum(1)
    return total / error[0].numel()
