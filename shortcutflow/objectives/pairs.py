"""Pairs of noise and what a network makes of it: what reflow and live reflow train on (Liu, Gong, Liu 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from shortcutflow.guidance import guided_velocity
from shortcutflow.types import Network


@torch.no_grad()
def end_of_flow(
    net: Network,
    noise: Tensor,
    y: Tensor | None,
    *,
    steps: int,
    told: float,
    scale: float,
    null_y: Tensor | float | None = None,
) -> Tensor:
    """Where equal Euler steps along a network's flow lead from noise: the other half of the pairs, (n, *shape).

    Args:
        steps: how many; each is one evaluation.
        told: the step size that the network is told: what stands for the flow in its training.
        scale: of classifier-free guidance; 1 is none.
        null_y: the null condition, for guidance.
    """
    x_t = noise
    d = torch.full((len(noise),), told, device=noise.device)
    for i in range(steps):
        t = torch.full_like(d, i / steps)
        x_t = x_t + guided_velocity(net, x_t, t, d, y, scale=scale, null_y=null_y).to(x_t.dtype) / steps
    return x_t
