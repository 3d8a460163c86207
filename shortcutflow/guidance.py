"""Conditions that are dropped, and classifier-free guidance in samplers and inside targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shortcutflow.types import Network


def predict(net: Network, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
    """The network's velocity, in float32 at least, so that differences and means of velocities keep their digits.

    Raises:
        ValueError: if it does not have the shape of x_t.
    """
    v = net(x_t, t, d, y)
    if v.shape != x_t.shape:
        raise ValueError(f"the network must return the shape of x_t, {tuple(x_t.shape)}, not {tuple(v.shape)}")
    return v.to(torch.promote_types(v.dtype, torch.float32))


def drop_condition(y: Tensor, dropped: Tensor, null_y: Tensor | float) -> Tensor:
    """Replace the conditions of dropped rows by the null condition.

    Args:
        y: (b, ...) labels or any tensor.
        dropped: (b,) bool.
        null_y: the null label, or a number or tensor that broadcasts to one row of y.
    """
    mask = dropped.view(-1, *(1,) * (y.ndim - 1))
    # A number is filled in on y's device: copying it there would hold up an accelerator.
    null = null_y.to(y) if isinstance(null_y, Tensor) else y.new_full((), null_y)
    return torch.where(mask, null, y)


def null_like(y: Tensor, null_y: Tensor | float | None) -> Tensor:
    """The null condition for every row of y.

    Raises:
        ValueError: if no null condition was given.
    """
    null = require_null(null_y)
    return null.to(y).expand_as(y) if isinstance(null, Tensor) else torch.full_like(y, null)


def require_null(null_y: Tensor | float | None) -> Tensor | float:
    """Give null_y back, or raise ValueError saying why one is needed."""
    if null_y is None:
        raise ValueError(
            "dropping conditions and guidance need null_y: the label (usually num_classes) or the tensor "
            "that stands for 'no condition'"
        )
    return null_y


def require_scale(scale: float) -> float:
    """Give a guidance scale back, or raise ValueError if it is not finite."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale}; 1 is no guidance")
    return scale


def guided_velocity(
    net: Network,
    x_t: Tensor,
    t: Tensor,
    d: Tensor,
    y: Tensor | None,
    *,
    scale: float,
    null_y: Tensor | float | None = None,
) -> Tensor:
    """Classifier-free guidance: s_null + scale (s_y - s_null), shape of x_t.

    scale 1 asks the condition alone and 0 the null condition alone, for the price of one evaluation; any other
    scale evaluates both as one batch of twice the size.

    Raises:
        ValueError: if scale is not finite, or not 1 and there is no condition, or no null_y.
    """
    if require_scale(scale) == 1:
        return predict(net, x_t, t, d, y)
    if y is None:
        raise ValueError(f"guidance_scale {scale:g} needs a condition y to guide by; without one it must be 1")
    null = null_like(y, null_y)
    if scale == 0:
        return predict(net, x_t, t, d, null)
    both = predict(net, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([d, d]), torch.cat([y, null]))
    with_y, with_null = both[: len(x_t)], both[len(x_t) :]  # which torch.export follows for any number of rows
    return with_null + scale * (with_y - with_null)


def partly_guided_velocity(
    net: Network,
    x_t: Tensor,
    t: Tensor,
    d: Tensor,
    y: Tensor | None,
    *,
    guided: Tensor,
    at_most: int,
    scale: float,
    null_y: Tensor | float | None = None,
) -> Tensor:
    """Velocities of which only some rows are guided, in one evaluation.

    Args:
        guided: (r,) bool, the rows to guide; all of them among the first ``at_most``.
        at_most: an upper bound that does not depend on the draw, so that shapes stay the same from step to step.
        scale: the guidance scale.

    Returns:
        (r, *shape): guided where ``guided`` says so, the plain conditional velocity elsewhere.
    """
    if require_scale(scale) == 1 or at_most == 0:
        return predict(net, x_t, t, d, y)
    if y is None:
        raise ValueError(f"guidance_scale {scale:g} needs a condition y to guide by; without one it must be 1")
    head = slice(at_most)
    null = null_like(y[head], null_y)
    v = predict(
        net, torch.cat([x_t, x_t[head]]), torch.cat([t, t[head]]), torch.cat([d, d[head]]), torch.cat([y, null])
    )
    with_y, with_null = v[: len(x_t)], v[len(x_t) :]
    mask = guided[head].view(-1, *(1,) * (x_t.ndim - 1))
    with_guidance = with_null + scale * (with_y[head] - with_null)
    return torch.cat([torch.where(mask, with_guidance, with_y[head]), with_y[at_most:]])
