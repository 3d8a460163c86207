"""A picture of a run's samples: a row a budget, the same noise in each column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortcutflow.evaluation.decoded import as_pictures
from shortcutflow.evaluation.generate import generate
from shortcutflow.evaluation.grids import sample_grid
from shortcutflow.evaluation.runs import Run
from shortcutflow.evaluation.starts import starts_of


def sample_sheet(
    run: Run,
    *,
    budgets: Sequence[int],
    labels: Sequence[int] | None = None,
    count: int | None = None,
    seed: int = 0,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """Draw samples, (height, width, 3) uint8.

    Args:
        run: a loaded run.
        budgets: numbers of steps.
        labels: a label a column; None takes ``count`` columns with all labels in turn.
        count: number of columns without labels; None is 10.
        seed: of the noise.
        guidance_scale: of the sampler.

    Raises:
        ValueError: for a run of no pictures, a budget below 1, labels out of range or of a run without any, or labels
            and count together.
    """
    info, config = run.config.data.describe(), run.config
    if not info.is_picture:
        raise ValueError(f"run {run.folder} makes no pictures: its samples have shape {info.shape}")
    if not all(budget >= 1 for budget in budgets):
        raise ValueError(f"steps must be at least 1, got {', '.join(map(str, budgets))}")
    device = next(run.network.parameters()).device
    noise, y = starts_of(info, labels=labels, count=count, seed=seed, device=device)
    rows = [
        generate(
            run.network, noise, y, steps=budget, guidance_scale=guidance_scale, seed=seed, **config.sampler_options()
        )
        for budget in budgets
    ]
    return sample_grid(
        [as_pictures(row, info) for row in rows], [f"{budget} step{'s' * (budget > 1)}" for budget in budgets]
    )
