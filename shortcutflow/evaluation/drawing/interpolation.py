"""Samples between two noises: a network with a smooth latent space turns one into the other without a break."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shortcutflow.evaluation.drawing.ends import as_fraction, names_of
from shortcutflow.evaluation.drawing.grids import sample_grid
from shortcutflow.evaluation.drawing.predictor import Predictor
from shortcutflow.evaluation.generate import fresh_noise_of

TITLE = "From noise A to noise B: x_0 = cos(u pi/2) A + sin(u pi/2) B, with u above each column."


def between(a: Tensor, b: Tensor, columns: int) -> Tensor:
    """Noises cos(u pi/2) a + sin(u pi/2) b for evenly spaced u in [0, 1], (columns, *a.shape).

    If a and b are independent standard normal, so is each of them. The first is a and the last b, to the bit.

    Raises:
        ValueError: for fewer than two columns or different shapes.
    """
    if columns < 2:
        raise ValueError(f"columns must be at least 2, the two ends, got {columns}")
    if a.shape != b.shape:
        raise ValueError(f"the two noises must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    angles = [math.pi / 2 * i / (columns - 1) for i in range(1, columns - 1)]
    return torch.stack([a, *(math.cos(angle) * a + math.sin(angle) * b for angle in angles), b])


def interpolate_samples(
    predictor: Predictor, noise: Tensor, y: Tensor | None, *, columns: int = 9, steps: int = 1, seed: int = 0
) -> Tensor:
    """Samples between pairs of noises, (pairs, columns, *shape).

    Args:
        predictor: the network.
        noise: (2 pairs, *shape); rows 2 i and 2 i + 1 are the ends of pair i.
        y: one condition a pair, (pairs, ...), or None.
        columns: samples a pair, its ends among them.
        steps: of the sampler.
        seed: of the noise that consistency models add after their steps, the same along a pair.
    """
    starts = between(noise[0::2], noise[1::2], columns).transpose(0, 1)
    pairs = len(starts)
    conditions = None if y is None else y.repeat_interleave(columns, dim=0)
    numbers = [2 * pair for pair in range(pairs) for _ in range(columns)]
    flat = starts.flatten(0, 1)
    made = predictor.sample(flat, conditions, steps=steps, fresh_noise=fresh_noise_of(seed, numbers, flat))
    return made.unflatten(0, (pairs, columns))


def interpolation_picture(
    by_budget: dict[int, Tensor], y: Tensor | None, names: Sequence[str] | None = None
) -> np.ndarray:
    """Draw :func:`interpolate_samples` of several budgets, (height, width, 3) uint8: a row a pair and budget.

    Args:
        by_budget: images (pairs, columns, channels, h, w) by number of steps.
        y: the pairs' labels, or None.
        names: of the pairs; None for their labels.
    """
    pairs, columns = next(iter(by_budget.values())).shape[:2]
    names = names or names_of(y, pairs)
    rows, labels = [], []
    for i, name in enumerate(names):
        for steps, samples in by_budget.items():
            rows.append(samples[i])
            budget = f"{steps} step{'s' * (steps > 1)}"
            labels.append(f"{name}  {budget}".strip())
    places = [as_fraction(i / (columns - 1)) for i in range(columns)]
    heads = ["A", *places[1:-1], "B"]
    return sample_grid(
        rows, labels, cell=64, columns=heads, group=len(by_budget) if len(by_budget) > 1 else 0, title=TITLE
    )
