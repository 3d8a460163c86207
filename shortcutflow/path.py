"""The linear path between noise and data (the paper's eq. 1 and 2), and the data that a velocity predicts.

x_t = (1 - (1 - sigma_min) t) x_0 + t x_1 with velocity v = x_1 - (1 - sigma_min) x_0. The paper's path (its
eq. 1 and 2) is sigma_min = 0; the released code keeps 1e-5 of the noise at t = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_to(t: Tensor, x: Tensor) -> Tensor:
    """View t of shape (b,) as (b, 1, ..., 1) in x's dtype, ready to multiply x of shape (b, *shape)."""
    return t.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def interpolate(noise: Tensor, data: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
    """The state x_t on the straight line from noise to data.

    Args:
        noise: x_0, (b, *shape).
        data: x_1, of the same shape.
        t: (b,) in [0, 1].
        sigma_min: fraction of the noise that is left at t = 1.

    Raises:
        ValueError: if the shapes differ or a t lies outside [0, 1].
    """
    check_state(data, t, what="data")
    if noise.shape != data.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, data {tuple(data.shape)}; they must be the same")
    check_unit_interval(t, "t")
    t = expand_to(t, data)
    return (1 - (t if sigma_min == 0 else (1 - sigma_min) * t)) * noise + t * data


def velocity(noise: Tensor, data: Tensor, sigma_min: float = 0.0) -> Tensor:
    """The velocity d x_t / d t of the straight line: data minus noise, (b, *shape)."""
    return data - (noise if sigma_min == 0 else (1 - sigma_min) * noise)


def predict_x1(x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Where a particle at x_t that keeps the velocity v arrives at t = 1: the data estimate x_t + (1 - t) v."""
    return x_t + (1 - expand_to(t, x_t)) * v


def check_state(x: Tensor, t: Tensor, *, what: str = "x_t") -> None:
    """Raise ValueError unless x is a batch (b, *shape) of floats and t one number a sample, (b,)."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"{what} must be a float tensor (batch, *shape), got {x.dtype} {tuple(x.shape)}")
    if t.shape != (x.shape[0],):
        raise ValueError(f"need one number a sample, shape ({x.shape[0]},), got {tuple(t.shape)}")


def check_unit_interval(value: Tensor, name: str) -> None:
    """Raise ValueError if an entry of value lies outside [0, 1].

    Only where reading it is free: not on an accelerator, which would have to be waited for, and not while compiling.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return
    lowest, highest = torch.aminmax(value)
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"{name} must lie in [0, 1] (0 = noise, 1 = data), got values from {float(lowest):g} to {float(highest):g}"
        )
