"""Consistency training (Song, Dhariwal, Chen, Sutskever 2023): no teacher, neighbours on one straight line."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from shortcutflow.objectives.consistency import ConsistencyObjective, same_end
from shortcutflow.objectives.objective import StepDraw, stage_of
from shortcutflow.objectives.regression import as_batch
from shortcutflow.path import interpolate, velocity
from shortcutflow.schedule import levels_of
from shortcutflow.types import WHOLE, Network, Share, Targets


class ConsistencyTrainingObjective(ConsistencyObjective):
    """Neighbours x_t and x_{t+d} of the straight line through one sample and one noise are to end alike.

    >>> objective = ConsistencyTrainingObjective(finest_steps=128)
    >>> report = objective(net, data, labels, target_net=ema_net, progress=step / steps, generator=g)

    The gap d halves from 1 to 2/M over L = log2(M) equal parts of the training. (At the very end, progress 1, it would
    be 1/M.) As released, but for the 1e-5 of noise that is left at t = 1 there, and for conditions that can be dropped:
    the released code trains this network on no null condition, so that it cannot be guided.

    Args:
        finest_steps: M, a power of two.
        condition_dropout: share of rows trained on the null condition.
        sigma_min: share of the noise left at t = 1.
    """

    kind: Literal["consistency_training"] = "consistency_training"

    @classmethod
    def released(cls, denoise_timesteps: int = 128) -> ConsistencyTrainingObjective:
        """The released code's ``train_type=consistency``. There the network ignores the step size."""
        return cls(finest_steps=denoise_timesteps, sigma_min=1e-5)

    def target_evaluations(self, batch_size: int) -> float:
        """One on each row, at the neighbour."""
        return 1.0

    def gap_at(self, progress: float | None) -> float:
        """The gap d between neighbours when so much of the training is done."""
        return 2.0 ** -stage_of(progress, levels_of(self.finest_steps), self.kind)

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> StepDraw:
        """Noise, times and dropped conditions for a batch of data (b, *shape).

        Raises:
            ValueError: without progress, the share of the training that is done.
        """
        return self.draw_steps(data, self.gap_at(progress), generator, share)

    @torch.no_grad()
    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: StepDraw,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """The rows of the regression; ``net`` says where the neighbours end, ``teacher`` is not used."""
        data, y = as_batch(net, data, y)
        y = self.drop(y, draw.dropped, null_y)
        next_t = draw.t + draw.size
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        next_x = interpolate(draw.noise, data, next_t, self.sigma_min)
        return same_end(net, x_t, draw.t, next_x, next_t, y, velocity(draw.noise, data, self.sigma_min))
