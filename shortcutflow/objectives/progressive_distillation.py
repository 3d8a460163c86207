"""Progressive distillation (Salimans and Ho 2022): halve the number of steps, become the teacher, halve it again."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.conditions import Condition
from shortcutflow.guidance import guided_velocity
from shortcutflow.objectives.objective import (
    NO_CONTEXT,
    Context,
    Draw,
    FinestSteps,
    GuidanceScale,
    Objective,
    guided_evaluations,
    require_teacher,
    rms_metrics,
    stage_of,
    two_legs,
)
from shortcutflow.schedule import levels_of
from shortcutflow.types import Network, Targets


class ProgressiveDistillationObjective(Objective):
    """One step of size d is to do what two steps of size d/2 of the teacher do; d doubles from 2/M to 1.

    >>> objective = ProgressiveDistillationObjective(finest_steps=128)
    >>> report = objective(net, data, labels, teacher=teacher, progress=step / steps, generator=g)

    The training has L = log2(M) stages of equal length, each with its own d. The teacher is a flow at first; at each
    further stage (:meth:`teacher_stage`) the training loop makes it a copy of the network that has just been trained.

    As released, but for the clip and the 1e-5 there; for conditions that can be dropped; and for the network being
    given d, where the released one ignores it and forgets the smaller steps at each stage.

    Args:
        finest_steps: M, a power of two.
        guidance_scale: classifier-free guidance of the first teacher, which later ones inherit; 1 is none.
        condition_dropout: fraction of rows trained on the null condition.
        clip: bound on the state between the teacher's steps; None for none.
        sigma_min: fraction of the noise left at t = 1.
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

    def target_evaluations(self, batch_size: int) -> float:
        """Two steps of the teacher on each row, and again without condition in the first stage; the mean over all."""
        extra = guided_evaluations(self.guidance_scale) - 1
        return 2 * (1 + extra / levels_of(self.finest_steps))

    def teacher_stage(self, progress: float | None) -> int:
        """The stage, 0 ... L - 1; at the beginning of each but the first the student becomes the teacher."""
        levels = levels_of(self.finest_steps)
        return min(stage_of(progress, levels, self.kind), levels - 1)

    def size_at(self, progress: float | None) -> float:
        """The step d that is being learnt when so much of the training is done."""
        return 2.0 ** (1 + self.teacher_stage(progress)) / self.finest_steps

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times, step size and dropped conditions for a batch of data (b, *shape); the first stage is guided.

        Raises:
            ValueError: without progress, the fraction of the training that is done.
        """
        draw = self.draw_steps(data, self.size_at(context.progress), generator, context)
        return replace(draw, max_guided=len(data) if self.teacher_stage(context.progress) == 0 else 0)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """The rows of the regression, from two steps of the teacher; no other network is called.

        Raises:
            ValueError: without a teacher.
        """
        teacher = require_teacher(context.teacher, self.kind)
        x_t, _, y = self.path_rows(net, data, y, draw, context)
        # The first teacher is a flow and gets d = 0, whatever its own M; later ones have learnt steps of d/2.
        d_teacher = torch.where(draw.d * self.finest_steps == 2, 0, draw.d / 2)

        def half_step(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
            return guided_velocity(
                teacher, x, t, d_teacher, y,
                scale=self.guidance_scale, null_y=context.null_y, max_guided=draw.max_guided,
            )  # fmt: skip

        v1, v2, v = two_legs(half_step, half_step, x_t, draw.t, draw.d, clip=self.clip)
        v = v.to(x_t.dtype)
        metrics = rms_metrics(bootstrap=v, b1=v1, b2=v2)
        return Targets(x_t, draw.t, draw.d, y, v, n_bootstrap=len(v), metrics=metrics)
