"""A network's velocity, and classifier-free guidance of it, in samplers and inside targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shortcutflow.conditions import Condition, NullCondition, concatenate, null_like, select
from shortcutflow.types import Network


def predict(net: Network, x_t: Tensor, t: Tensor, d: Tensor, y: Condition) -> Tensor:
    """The network's velocity, in float32 at least, so that differences and means of velocities keep their digits.

    Raises:
        ValueError: if it does not have the shape of x_t.
    """
    return predict_with_aux(net, x_t, t, d, y)[0]


def predict_with_aux(net: Network, x_t: Tensor, t: Tensor, d: Tensor, y: Condition) -> tuple[Tensor, Any]:
    """As :func:`predict`, and what a network that returns ``(v, aux)`` returns with its velocity, else None."""
    output = net(x_t, t, d, y)
    v, aux = output if isinstance(output, tuple) else (output, None)
    if v.shape != x_t.shape:
        raise ValueError(f"the network must return the shape of x_t, {tuple(x_t.shape)}, not {tuple(v.shape)}")
    return v.to(torch.promote_types(v.dtype, torch.float32)), aux


def with_scale(y: Condition, scale: Tensor | float) -> dict[str, Any]:
    """The condition of a network that takes the guidance scale as an input, as one with ``guidance_input`` does."""
    return {"y": y, "guidance": scale}


def guided_velocity(
    net: Network,
    x_t: Tensor,
    t: Tensor,
    d: Tensor,
    y: Condition,
    *,
    scale: float,
    null_y: NullCondition = None,
    mask: Tensor | None = None,
    max_guided: int | None = None,
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): s_null + scale (s_y - s_null), shape of x_t.

    Scale 1 evaluates the condition alone and 0 the null condition alone, for the price of one evaluation; any other
    evaluates both as one batch. A network whose attribute ``guidance_input`` is true is given the scale instead, in one
    evaluation; see :class:`shortcutflow.objectives.GuidedShortcutObjective`.

    Args:
        net: the network.
        x_t, t, d, y: its inputs, r rows.
        scale: of the guidance.
        null_y: the null condition.
        mask: (n,) bool, of the first rows those to guide; None guides all of ``max_guided``.
        max_guided: at most so many of the first rows are guided, the others never: fixed from step to step, so that
            shapes do not depend on the mask; None is all rows.

    Raises:
        ValueError: if scale is not finite, or not 1 and there is no condition, or no null_y.
    """
    if require_scale(scale) not in (0, 1) and max_guided is None and getattr(net, "guidance_input", False):
        return predict(net, x_t, t, d, with_scale(y, torch.full_like(t, scale)))
    if scale == 1 or max_guided == 0:
        return predict(net, x_t, t, d, y)
    if y is None:
        raise ValueError(f"guidance_scale {scale:g} needs a condition y to guide by; without one it must be 1")
    head = slice(max_guided)
    null = null_like(select(y, head), null_y)
    if scale == 0 and mask is None and max_guided in (None, len(x_t)):
        return predict(net, x_t, t, d, null)
    v = predict(
        net, torch.cat([x_t, x_t[head]]), torch.cat([t, t[head]]), torch.cat([d, d[head]]), concatenate(y, null)
    )
    with_y, with_null = v[: len(x_t)], v[len(x_t) :]  # which torch.export follows for any number of rows
    guided = torch.add(with_null, with_y[head] - with_null, alpha=scale)
    if mask is not None:
        guided = torch.where(mask[head].view(-1, *(1,) * (x_t.ndim - 1)), guided, with_y[head])
    return guided if max_guided is None else torch.cat([guided, with_y[max_guided:]])


def require_scale(scale: float) -> float:
    """Return a guidance scale, or raise ValueError if it is not finite."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale}; 1 is no guidance")
    return scale
