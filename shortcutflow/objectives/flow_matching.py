"""Flow matching: regress the velocity of the straight line (Lipman et al. 2022; Liu et al. 2022; the paper's eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor

from shortcutflow.objectives.objective import TrainingObjective, noise_for
from shortcutflow.objectives.regression import as_batch
from shortcutflow.path import interpolate, velocity
from shortcutflow.schedule import draw_times_on_grid, levels_of
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import WHOLE, Network, Share, Targets


@dataclass(frozen=True)
class FlowDraw:
    """The random numbers of one evaluation: noise (b, *shape), t (b,) float32, dropped (b,) bool."""

    noise: Tensor
    t: Tensor
    dropped: Tensor


class FlowMatchingObjective(TrainingObjective):
    """Plain flow matching, the network told d = 0: the contrast to a shortcut model.

    >>> FlowMatchingObjective(condition_dropout=0.1)

    Args:
        time_steps: None draws t uniformly from [0, 1); a number T draws it from {0, 1/T, ..., 1 - 1/T}.
        condition_dropout: share of rows trained on the null condition, for guidance when sampling.
        sigma_min: share of the noise left at t = 1.
    """

    kind: Literal["flow_matching"] = "flow_matching"
    time_steps: int | None = Field(default=None, description="draw t from this many equal steps; None: from [0, 1)")

    @field_validator("time_steps")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None:
            levels_of(value)
        return value

    @classmethod
    def released(cls, denoise_timesteps: int = 128, class_dropout_prob: float = 0.1) -> FlowMatchingObjective:
        """The released code's ``train_type=naive``: t on a grid, 1e-5 of the noise left at t = 1.

        There the network ignores the step size; build it with ``ignore_step_size=True``.
        """
        return cls(time_steps=denoise_timesteps, condition_dropout=class_dropout_prob, sigma_min=1e-5)

    @property
    def tells_step_size(self) -> bool:
        """False: such a network knows the flow alone, so a sampler must not tell it larger steps."""
        return False

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> FlowDraw:
        """Noise, times and dropped conditions for a batch of data (b, *shape)."""
        b, device = len(data) * share.total, data.device
        generator = generator_or_default(generator, device)
        noise = noise_for(data, generator, share)
        if self.time_steps is None:
            t = torch.rand(b, generator=generator, device=device)
        else:
            t = draw_times_on_grid(b, 1 / self.time_steps, generator=generator, device=device)
        return FlowDraw(noise, t[share.rows], self.draw_dropped(b, generator, device)[share.rows])

    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: FlowDraw,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """v = x_1 - x_0 at x_t; neither ``net`` nor ``teacher`` is called."""
        data, y = as_batch(net, data, y)
        return Targets(
            x_t=interpolate(draw.noise, data, draw.t, self.sigma_min),
            t=draw.t,
            d=torch.zeros_like(draw.t),
            y=self.drop(y, draw.dropped, null_y),
            v=velocity(draw.noise, data, self.sigma_min),
        )
