"""Denoising trajectories: the states a sampler goes through, and where each is bound for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.drawing.ends import Ends, draw_ends, names_of
from shortcutflow.evaluation.drawing.predictor import Predictor
from shortcutflow.evaluation.generate import fresh_noise_of

TITLE = (
    "{steps} step{s}. x_t: the states. flow: x_t + (1 - t) s(x_t, t, 0), the mean of what x_t may become. "
    "steps: the end by the fewest steps that training knows; equal ends mean a self-consistent network."
)


def follow(
    predictor: Predictor, noise: Tensor, y: Tensor | None, *, steps: int, columns: int = 9, seed: int = 0
) -> Ends:
    """Sample, keep some of the states, and ask from each where it ends.

    Args:
        predictor: the network.
        noise: (n, *shape).
        y: conditions or None.
        steps: of the sampler.
        columns: how many states are kept of steps + 1, evenly, the first and the last among them.
        seed: of the noise that consistency models add after their steps.

    Raises:
        ValueError: for steps below 1 or finer than those of training, or fewer than two columns.
    """
    if columns < 2:
        raise ValueError(f"columns must be at least 2, the noise and the sample, got {columns}")
    if predictor.knows_steps and steps > predictor.finest_steps:
        raise ValueError(
            f"steps must be at most {predictor.finest_steps}, the finest of the training, got {steps}: from the states "
            "between, the network knows no step"
        )
    walked = predictor.walk(noise, y, steps=steps, fresh_noise=fresh_noise_of(seed, range(len(noise)), noise))
    kept = np.linspace(0, steps, min(columns, steps + 1)).round().astype(int).tolist()
    t, x_t = [float(walked.t[i]) for i in kept], walked.x_t[kept]
    return Ends(
        t, x_t,
        torch.stack([_end_by_flow(predictor, s, now, y) for now, s in zip(t, x_t, strict=True)])
        if predictor.knows_flow else None,
        torch.stack([predictor.end_by_steps(s, now, y) if now < 1 else s for now, s in zip(t, x_t, strict=True)])
        if predictor.knows_steps else None,
    )  # fmt: skip


def trajectory_picture(
    predictor: Predictor,
    noise: Tensor,
    y: Tensor | None,
    decoder: ImageDecoder,
    *,
    steps: int,
    columns: int = 9,
    seed: int = 0,
) -> np.ndarray:
    """Draw :func:`follow`: (height, width, 3) uint8, a column a state."""
    ends = follow(predictor, noise, y, steps=steps, columns=columns, seed=seed)
    title = TITLE.format(steps=steps, s="s" * (steps > 1))
    return draw_ends(ends.decoded(decoder), names=names_of(y, len(noise)), title=title)


def _end_by_flow(predictor: Predictor, x_t: Tensor, t: float, y: Tensor | None) -> Tensor:
    if t == 1:
        return x_t
    return predictor.end_by_flow(x_t, torch.full((len(x_t),), t, device=x_t.device), y)
