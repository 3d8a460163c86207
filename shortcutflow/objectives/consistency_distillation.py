"""Consistency distillation (Song, Dhariwal, Chen, Sutskever 2023): neighbours on a trajectory of a trained flow."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.guidance import guided_velocity
from shortcutflow.objectives.consistency import ConsistencyObjective, same_end
from shortcutflow.objectives.objective import GuidanceScale, StepDraw, guided_evaluations, require_teacher
from shortcutflow.objectives.regression import as_batch
from shortcutflow.path import interpolate
from shortcutflow.types import WHOLE, Network, Share, Targets


class ConsistencyDistillationObjective(ConsistencyObjective):
    """x_t, and where a step 1/M of the teacher's flow takes it, are to end alike.

    >>> objective = ConsistencyDistillationObjective(finest_steps=128)
    >>> report = objective(net, data, labels, target_net=ema_net, teacher=flow_net, generator=g)

    As released, but for the clip and the 1e-5 there, and for guidance of the teacher and dropped conditions, which it
    does not have.

    Args:
        finest_steps: M, a power of two.
        guidance_scale: classifier-free guidance of the teacher's step; 1 is none.
        condition_dropout: share of rows trained on the null condition.
        clip: bound on the state after the teacher's step; None for none.
        sigma_min: share of the noise left at t = 1.
    """

    kind: Literal["consistency_distillation"] = "consistency_distillation"
    guidance_scale: GuidanceScale = 1.0
    clip: float | None = Field(default=None, gt=0, description="bound on the state after the teacher's step")

    @classmethod
    def released(cls, denoise_timesteps: int = 128) -> ConsistencyDistillationObjective:
        """The released code's ``train_type=consistency-distillation``: states clipped at +-4.

        There the network ignores the step size, and the teacher is the average of a run of ``naive``.
        """
        return cls(finest_steps=denoise_timesteps, clip=4.0, sigma_min=1e-5)

    @property
    def needs_teacher(self) -> bool:
        """True: a network trained by flow matching."""
        return True

    def target_evaluations(self, batch_size: int) -> float:
        """The teacher's step and the neighbour's end on each row."""
        return guided_evaluations(self.guidance_scale) + 1.0

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> StepDraw:
        """Noise, times and dropped conditions for a batch of data (b, *shape); ``progress`` is not used."""
        return self.draw_steps(data, 1 / self.finest_steps, generator, share)

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
        """The rows of the regression: ``teacher`` makes the step, ``net`` says where it ends.

        Raises:
            ValueError: without a teacher.
        """
        data, y = as_batch(net, data, y)
        teacher = require_teacher(teacher, self.kind)
        y = self.drop(y, draw.dropped, null_y)
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        # The teacher is asked for its flow, d = 0.
        flow = torch.zeros_like(draw.t)
        v = guided_velocity(teacher, x_t, draw.t, flow, y, scale=self.guidance_scale, null_y=null_y)
        next_x = (x_t + draw.size * v).to(x_t.dtype)
        if self.clip is not None:
            next_x = next_x.clamp(-self.clip, self.clip)
        return same_end(net, x_t, draw.t, next_x, draw.t + draw.size, y, v)
