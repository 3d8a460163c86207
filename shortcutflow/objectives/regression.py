"""What all objectives share: their settings' base class and the regression of a network on target velocities."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from shortcutflow.guidance import drop_condition, predict, require_null
from shortcutflow.inputs import as_condition, as_state
from shortcutflow.path import check_state
from shortcutflow.types import LossReport, Mean, Network, SamplerKind, Targets


class ObjectiveSettings(BaseModel):
    """Base of the objectives: frozen, strict settings, readable from and writable to JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    condition_dropout: float = Field(default=0.0, ge=0, le=1, description="share of rows that lose their condition")
    sigma_min: float = Field(default=0.0, ge=0, lt=1, description="share of the noise that is left at t = 1")

    def target_evaluations(self, batch_size: int) -> float:
        """Forward evaluations that the targets of such a batch need, divided by its samples; 0 unless overridden."""
        return 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether it is the second phase of two: needs a trained network, whose weights it starts from."""
        return False

    @property
    def sampler(self) -> SamplerKind:
        """The sampler that such a network is made for."""
        return "euler"

    def teacher_stage(self, progress: float) -> int:
        """Whenever this number grows, the teacher becomes a copy of the network that makes targets."""
        return 0

    def draw_dropped(self, rows: int, generator: Generator | None, device: torch.device) -> Tensor:
        """Which rows lose their condition, (rows,) bool."""
        return torch.rand(rows, generator=generator, device=device) < self.condition_dropout

    def drop(self, y: Tensor | None, dropped: Tensor, null_y: Tensor | float | None) -> Tensor | None:
        """Apply dropped to y; a condition_dropout of 0 needs no null_y.

        Raises:
            ValueError: if rows may be dropped and y or null_y is missing.
        """
        if y is None:
            if self.condition_dropout:
                raise ValueError(
                    f"condition_dropout is {self.condition_dropout:g}, but there is no condition y to drop: "
                    "pass y, or set condition_dropout to 0"
                )
            return None
        if self.condition_dropout == 0 and null_y is None:
            return y
        return drop_condition(y, dropped, require_null(null_y))


def rows_of(fraction: float, batch_size: int, kind: str) -> int:
    """How many of batch_size rows are of a kind that gets this share of them.

    Raises:
        ValueError: if some are asked for and the batch is too small to hold one.
    """
    n = int(batch_size * fraction + 1e-6)
    if n == 0 and fraction > 0:
        smallest = math.ceil((1 - 1e-6) / fraction)
        raise ValueError(
            f"a batch of {batch_size} holds no {kind} row at {kind}_fraction {fraction:g}: "
            f"use at least {smallest} samples, a fraction of at least 1/{batch_size}, or 0 for none"
        )
    return n


def as_batch(net: Network, data: Tensor, y: Any) -> tuple[Tensor, Tensor | None]:
    """Data and conditions as the network takes them; see :mod:`shortcutflow.inputs`.

    Raises:
        ValueError: unless data is (b, *shape) floats and y, if any, has b rows too.
    """
    if not isinstance(data, Tensor):
        raise ValueError(f"data must be a float tensor (batch, *shape), got {type(data).__name__}: use torch.as_tensor")
    if data.ndim < 2 or not data.is_floating_point():
        raise ValueError(f"data must be a float tensor (batch, *shape), got {data.dtype} {tuple(data.shape)}")
    data, y = as_state(net, data), as_condition(y, data)
    if y is not None and y.shape[:1] != data.shape[:1]:
        raise ValueError(f"y must have one row a sample: data has {len(data)}, y has shape {tuple(y.shape)}")
    return data, y


def regress(net: Network, targets: Targets) -> LossReport:
    """Mean over rows of the mean squared error of s(x_t, t, d, y) against v (the paper's eq. 5, all rows alike).

    Raises:
        ValueError: if the network's output has another shape than x_t.
    """
    check_state(targets.x_t, targets.t)
    prediction = predict(net, targets.x_t, targets.t, targets.d, targets.y)
    row_loss = (prediction.to(targets.v.dtype) - targets.v).square().flatten(1).mean(1)
    loss = row_loss.mean()
    row_loss = row_loss.detach()
    n = targets.n_bootstrap
    parts = {"loss": row_loss, "loss_flow": row_loss[n:], "loss_bootstrap": row_loss[:n]}
    means = {name: Mean(rows.sum(), len(rows)) for name, rows in parts.items()} | targets.metrics
    return LossReport(loss=loss, means=means, row_loss=row_loss, targets=targets)
