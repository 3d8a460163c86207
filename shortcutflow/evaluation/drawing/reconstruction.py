"""Reconstruction: real data with noise on it, sent back to t = 1 by one step of each size that the network knows.

As the released code logs it ("reconstruction_shortcut" and "reconstruction_flow"): the step of size d starts at
t = 1 - d, and beside it stands what the flow alone says there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shortcutflow.evaluation.drawing.ends import Ends, as_fraction, draw_ends, names_of
from shortcutflow.evaluation.drawing.predictor import Predictor
from shortcutflow.path import interpolate
from shortcutflow.schedule import levels_of

TITLE = (
    "x_t: real data with noise on it. flow: x_t + (1 - t) s(x_t, t, 0). "
    "steps: one step of size d to t = 1. The last column is the data."
)


def reconstruct(
    predictor: Predictor, data: Tensor, noise: Tensor, y: Tensor | None, *, most_columns: int | None = None
) -> Ends:
    """Send x_t to t = 1 from t = 0, 1/2, 3/4, ... 1 - 1/M, by two evaluations for all times together.

    Args:
        predictor: the network.
        data, noise: (n, *shape).
        y: conditions of the data, (n, ...), or None.
        most_columns: of these times, evenly chosen, the first and the last among them; None keeps all.

    Returns:
        A column a time and, last, the data at t = 1.
    """
    times = [1 - 2.0**-level for level in range(levels_of(predictor.finest_steps) + 1)]
    if most_columns is not None and most_columns < len(times):
        times = [times[round(i * (len(times) - 1) / (most_columns - 1))] for i in range(most_columns)]
    c, n = len(times), len(data)
    t = torch.tensor(times, device=data.device).repeat_interleave(n)
    x_t = interpolate(_repeated(noise, c), _repeated(data, c), t)
    conditions = None if y is None else _repeated(y, c)

    def with_data(ends: Tensor) -> Tensor:
        return torch.cat([ends.unflatten(0, (c, n)), data[None]])

    return Ends(
        [*times, 1.0],
        with_data(x_t),
        with_data(predictor.end_by_flow(x_t, t, conditions)) if predictor.knows_flow else None,
        with_data(predictor.end_by_step(x_t, t, conditions)) if predictor.knows_steps else None,
    )


def reconstruction_picture(ends: Ends, y: Tensor | None) -> np.ndarray:
    """Draw :func:`reconstruct`, as images: (height, width, 3) uint8, a column a step size."""
    columns = [*(f"d = {as_fraction(1 - t)}" for t in ends.t[:-1]), "data"]
    return draw_ends(ends, names=names_of(y, ends.x_t.shape[1]), title=TITLE, columns=columns)


def _repeated(rows: Tensor, times: int) -> Tensor:
    """(times * n, ...) of rows (n, ...), all of them for the first time first."""
    return rows.repeat(times, *(1,) * (rows.ndim - 1))
