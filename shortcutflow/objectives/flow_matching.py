"""Flow matching: regress the velocity of the straight line (Lipman et al. 2022; Liu et al. 2022; the paper's eq. 2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from shortcutflow.conditions import Condition
from shortcutflow.objectives.objective import NO_CONTEXT, Context, Draw, TimeSteps
from shortcutflow.objectives.plug_in import FlowObjective
from shortcutflow.schedule import TimeDensity, draw_times, to_grid
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import Network, Targets


class FlowMatchingObjective(FlowObjective):
    """Plain flow matching, the network given d = 0: the contrast to a shortcut model.

    >>> FlowMatchingObjective(condition_dropout=0.1)

    Args:
        time_steps: None draws t from [0, 1); a number T draws it from {0, 1/T, ..., 1 - 1/T}.
        time_density: of t; None is uniform.
        condition_dropout: fraction of rows trained on the null condition, for guidance when sampling.
        sigma_min: fraction of the noise left at t = 1.
        plug_in_groups: see :class:`shortcutflow.objectives.plug_in.FlowObjective`.
    """

    kind: Literal["flow_matching"] = "flow_matching"
    time_steps: TimeSteps = None
    time_density: TimeDensity = None

    @classmethod
    def released(cls, denoise_timesteps: int = 128, class_dropout_prob: float = 0.1) -> FlowMatchingObjective:
        """The released code's ``train_type=naive``: t on a grid, 1e-5 of the noise left at t = 1.

        There the network ignores the step size; build it with ``ignore_step_size=True``.
        """
        return cls(time_steps=denoise_timesteps, condition_dropout=class_dropout_prob, sigma_min=1e-5)

    @property
    def step_conditioned(self) -> bool:
        """False: such a network knows the flow alone, so a sampler must not give it larger steps."""
        return False

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times and dropped conditions for a batch of data (b, *shape)."""
        b, device, generator = context.batch_size(data), data.device, generator_or_default(generator, data.device)
        noise = self.draw_noise(data, generator, context)
        t = draw_times(b, density=self.time_density, generator=generator, device=device)
        if self.time_steps is not None:
            t = to_grid(t, 1 / self.time_steps)
        return Draw(noise, t, torch.zeros_like(t), self.draw_dropped(b, generator, device)).at(context.batch_slice)

    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """v = x_1 - x_0 at x_t (eq. 2); no network is called."""
        x_t, v, y = self.path_rows(net, data, y, draw, context)
        return Targets(x_t, draw.t, draw.d, y, v)
