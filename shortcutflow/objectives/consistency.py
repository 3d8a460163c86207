"""Consistency training and distillation (Song, Dhariwal, Chen, Sutskever 2023).

A consistency model says where the flow through x_t ends. In this library's terms it makes the one step that is left,
d = 1 - t, so its end point is f(x_t, t) = x_t + (1 - t) s(x_t, t, 1 - t), which is x_t itself at t = 1. It is taught
that two neighbours on a trajectory have one end:

    f(x_t, t)  <-  f(x_{t+d}, t + d)     as a velocity     s(x_t, t, 1 - t)  <-  (f(x_{t+d}, t + d) - x_t) / (1 - t)

The neighbour lies on the straight line through one sample and one noise (training), or where a step of a trained flow
leads (distillation).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.conditions import Condition
from shortcutflow.guidance import guided_velocity, predict
from shortcutflow.objectives.objective import (
    NO_CONTEXT,
    Context,
    Draw,
    FinestSteps,
    GuidanceScale,
    Objective,
    clipped,
    guided_evaluations,
    require_teacher,
    rms_metrics,
    stage_of,
)
from shortcutflow.path import expand_to, interpolate, predict_x1, velocity
from shortcutflow.schedule import levels_of
from shortcutflow.types import Network, SamplerKind, Targets


class ConsistencyObjective(Objective):
    """Base of the two. The network is given d = 1 - t, in training and by its sampler, and no other."""

    finest_steps: FinestSteps = 128

    @property
    def sampler(self) -> SamplerKind:
        """Jump to the end, add noise, jump again."""
        return "consistency"


class ConsistencyTrainingObjective(ConsistencyObjective):
    """Neighbours x_t and x_{t+d} of the straight line through one sample and one noise are to end alike.

    >>> objective = ConsistencyTrainingObjective(finest_steps=128)
    >>> report = objective(net, data, labels, target_net=ema_net, progress=step / steps, generator=g)

    The gap d halves from 1 to 2/M over L = log2(M) equal parts of the training. (At the very end, progress 1, it would
    be 1/M.) As released, but for the 1e-5 of noise that is left at t = 1 there, and for conditions that can be dropped:
    the released code trains this network on no null condition, so that it cannot be guided.

    Args:
        finest_steps: M, a power of two.
        condition_dropout: fraction of rows trained on the null condition.
        sigma_min: fraction of the noise left at t = 1.
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

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times, gap and dropped conditions for a batch of data (b, *shape).

        Raises:
            ValueError: without progress, the fraction of the training that is done.
        """
        return self.draw_steps(data, self.gap_at(context.progress), generator, context)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """The rows of the regression; the target network says where the neighbours end."""
        data, y = self.row_inputs(net, data, y, draw, context)
        next_t = draw.t + draw.d
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        next_x = interpolate(draw.noise, data, next_t, self.sigma_min)
        leg = velocity(draw.noise, data, self.sigma_min)
        return consistency_targets(context.target_network(net), x_t, draw.t, next_x, next_t, y, leg)


class ConsistencyDistillationObjective(ConsistencyObjective):
    """x_t, and where a step 1/M of the teacher's flow takes it, are to end alike.

    >>> objective = ConsistencyDistillationObjective(finest_steps=128)
    >>> report = objective(net, data, labels, target_net=ema_net, teacher=flow_net, generator=g)

    As released, but for the clip and the 1e-5 there, and for guidance of the teacher and dropped conditions, which it
    does not have.

    Args:
        finest_steps: M, a power of two.
        guidance_scale: classifier-free guidance of the teacher's step; 1 is none.
        condition_dropout: fraction of rows trained on the null condition.
        clip: bound on the state after the teacher's step; None for none.
        sigma_min: fraction of the noise left at t = 1.
    """

    kind: Literal["consistency_distillation"] = "consistency_distillation"
    guidance_scale: GuidanceScale = 1.0
    clip: float | None = Field(default=None, gt=0, description="bound on the state after the teacher's step")

    @classmethod
    def released(cls, denoise_timesteps: int = 128) -> ConsistencyDistillationObjective:
        """The released code's ``train_type=consistency-distillation``: states clipped at +-4.

        There the network ignores the step size, and the teacher is the EMA of a run of ``naive``.
        """
        return cls(finest_steps=denoise_timesteps, clip=4.0, sigma_min=1e-5)

    @property
    def needs_teacher(self) -> bool:
        """True: a network trained by flow matching."""
        return True

    def target_evaluations(self, batch_size: int) -> float:
        """The teacher's step and the neighbour's end on each row."""
        return guided_evaluations(self.guidance_scale) + 1.0

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times and dropped conditions for a batch of data (b, *shape)."""
        return self.draw_steps(data, 1 / self.finest_steps, generator, context)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """The rows of the regression: the teacher makes the step, the target network says where it ends.

        Raises:
            ValueError: without a teacher.
        """
        teacher = require_teacher(context.teacher, self.kind)
        x_t, _, y = self.path_rows(net, data, y, draw, context)
        # d = 0 is the flow of any network, whatever its own M.
        flow = torch.zeros_like(draw.t)
        v = guided_velocity(teacher, x_t, draw.t, flow, y, scale=self.guidance_scale, null_y=context.null_y)
        next_x = clipped((x_t + expand_to(draw.d, x_t) * v).to(x_t.dtype), self.clip)
        return consistency_targets(context.target_network(net), x_t, draw.t, next_x, draw.t + draw.d, y, v)


def consistency_targets(
    net: Network, x_t: Tensor, t: Tensor, next_x: Tensor, next_t: Tensor, y: Condition, leg: Tensor
) -> Targets:
    """Rows that are to end where net says that their neighbours do.

    Args:
        net: makes the neighbours' jumps.
        x_t, t: (b, *shape) and (b,), t < 1.
        next_x, next_t: the neighbours, at later times up to 1, where the end is the neighbour itself.
        y: conditions, dropped ones already replaced.
        leg: (b, *shape) the velocity that led to the neighbours, for the metrics.
    """
    next_v = predict(net, next_x, next_t, 1 - next_t, y)
    end = torch.where(expand_to(next_t, next_x) < 1, predict_x1(next_x, next_t, next_v), next_x)
    v = ((end - x_t) / expand_to(1 - t, x_t)).to(x_t.dtype)
    metrics = rms_metrics(bootstrap=v, b1=leg, b2=next_v)
    return Targets(x_t, t, 1 - t, y, v, n_bootstrap=len(t), metrics=metrics)
