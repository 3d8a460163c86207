"""A picture of a run's samples: a row a budget, the same noise in each column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.drawing.grids import sample_grid
from shortcutflow.evaluation.drawing.starts import starts_of
from shortcutflow.evaluation.generate import generate
from shortcutflow.evaluation.subject import Subject


def sample_sheet(
    subject: Subject,
    *,
    budgets: Sequence[int],
    labels: Sequence[int] | None = None,
    count: int | None = None,
    seed: int = 0,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """Draw samples, (height, width, 3) uint8.

    Args:
        subject: what is sampled.
        budgets: numbers of steps.
        labels: a label a column; None takes ``count`` columns with all labels in turn.
        count: number of columns without labels; None is 10.
        seed: of the noise.
        guidance_scale: of the sampler.

    Raises:
        ValueError: for a network of no pictures, a budget below 1, labels out of range or where there are none, or
            labels and count together.
    """
    info = subject.info
    if not info.is_picture:
        raise ValueError(f"{subject.name} makes no pictures: its samples have shape {info.shape}")
    if not all(budget >= 1 for budget in budgets):
        raise ValueError(f"steps must be at least 1, got {', '.join(map(str, budgets))}")
    noise, y = starts_of(info, labels=labels, count=count, seed=seed, device=subject.device)
    options = {"guidance_scale": guidance_scale, "seed": seed, **subject.sampler_options()}
    rows = [generate(subject.network, noise, y, steps=budget, **options) for budget in budgets]
    return sample_grid(
        ImageDecoder(info, subject.device)(*rows), [f"{budget} step{'s' * (budget > 1)}" for budget in budgets]
    )
