"""Progressive distillation (Salimans and Ho 2022): halve the number of steps, become the teacher, halve it again."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.guidance import guided_velocity
from shortcutflow.objectives.objective import (
    FinestSteps,
    GuidanceScale,
    StepDraw,
    TrainingObjective,
    guided_evaluations,
    magnitudes,
    require_teacher,
    stage_of,
)
from shortcutflow.objectives.regression import as_batch
from shortcutflow.path import interpolate
from shortcutflow.schedule import levels_of
from shortcutflow.types import WHOLE, Network, Share, Targets


class ProgressiveDistillationObjective(TrainingObjective):
    """One step of size d is to do what two steps of size d/2 of the teacher do; d doubles from 2/M to 1.

    >>> objective = ProgressiveDistillationObjective(finest_steps=128)
    >>> report = objective(net, data, labels, teacher=teacher, progress=step / steps, generator=g)

    The training has L = log2(M) stages of equal length, each with its own d. The teacher is a flow at first; at each
    further stage (:meth:`teacher_stage`) whoever trains makes it a copy of the network that has just been trained.

    As released, but for the clip and the 1e-5 there; for conditions that can be dropped; and for the network being told
    d, where the released one ignores it and forgets the smaller steps at each stage.

    Args:
        finest_steps: M, a power of two.
        guidance_scale: classifier-free guidance of the first teacher, which later ones inherit; 1 is none.
        condition_dropout: share of rows trained on the null condition.
        clip: bound on the state between the teacher's steps; None for none.
        sigma_min: share of the noise left at t = 1.
    """

    kind: Literal["progressive_distillation"] = "progressive_distillation"
    finest_steps: FinestSteps = 128
    guidance_scale: GuidanceScale = 1.0
    clip: float | None = Field(default=None, gt=0, description="bound on the state between the teacher's steps")

    @classmethod
    def released(
        cls, *, denoise_timesteps: int = 128, bootstrap_cfg: bool = False, cfg_scale: float = 4.0
    ) -> ProgressiveDistillationObjective:
        """The released code's ``train_type=progressive``: states clipped at +-4, labels never dropped.

        There the network ignores the step size. Its ``bootstrap_ema`` is the choice of ``teacher`` here. At its very
        last step the schedule runs over the end, to d = 2; here it stays at d = 1.
        """
        return cls(
            finest_steps=denoise_timesteps,
            guidance_scale=cfg_scale if bootstrap_cfg else 1.0,
            clip=4.0,
            sigma_min=1e-5,
        )

    @property
    def needs_teacher(self) -> bool:
        """True: a network trained by flow matching, at first."""
        return True

    @property
    def tells_step_size(self) -> bool:
        """True, though what it learnt last, the step it was told last, it knows best."""
        return True

    def target_evaluations(self, batch_size: int) -> float:
        """Two steps of the teacher on each row, and again without condition in the first stage; the mean over all."""
        extra = guided_evaluations(self.guidance_scale) - 1
        return 2 * (1 + extra / levels_of(self.finest_steps))

    def teacher_stage(self, progress: float) -> int:
        """The stage, 0 ... L - 1; at the beginning of each but the first the student becomes the teacher."""
        levels = levels_of(self.finest_steps)
        return min(stage_of(progress, levels, self.kind), levels - 1)

    def size_at(self, progress: float | None) -> float:
        """The step d that is being learnt when so much of the training is done."""
        levels = levels_of(self.finest_steps)
        return 2.0 ** (1 + min(stage_of(progress, levels, self.kind), levels - 1)) / self.finest_steps

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
        return self.draw_steps(data, self.size_at(progress), generator, share)

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
        """The rows of the regression, from two steps of ``teacher``; ``net`` is not called.

        Raises:
            ValueError: without a teacher.
        """
        data, y = as_batch(net, data, y)
        teacher = require_teacher(teacher, self.kind)
        y = self.drop(y, draw.dropped, null_y)
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        half = draw.size / 2
        is_first_stage = draw.size == 2 / self.finest_steps
        scale = self.guidance_scale if is_first_stage else 1.0
        # The first teacher is a flow, whatever its own M; later ones have learnt steps of this size.
        d_teacher = torch.full_like(draw.t, 0.0 if is_first_stage else half)
        v1 = guided_velocity(teacher, x_t, draw.t, d_teacher, y, scale=scale, null_y=null_y)
        half_way = (x_t + half * v1).to(x_t.dtype)
        if self.clip is not None:
            half_way = half_way.clamp(-self.clip, self.clip)
        v2 = guided_velocity(teacher, half_way, draw.t + half, d_teacher, y, scale=scale, null_y=null_y)
        v = ((v1 + v2) / 2).to(x_t.dtype)
        metrics = magnitudes(bootstrap=v, b1=v1, b2=v2)
        return Targets(x_t, draw.t, torch.full_like(draw.t, draw.size), y, v, n_bootstrap=len(v), metrics=metrics)
