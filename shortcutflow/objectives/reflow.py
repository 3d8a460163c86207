"""Reflow (Liu, Gong, Liu 2022, "Flow Straight and Fast"): flow matching on pairs that a trained flow has made.

Where flow matching pairs any noise with any sample, so that its lines cross and its flow bends, reflow pairs each noise
with the end of its own trajectory. Such lines cross less, and a straighter flow needs fewer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.objectives.objective import (
    GuidanceScale,
    TrainingObjective,
    guided_evaluations,
    noise_for,
    require_teacher,
)
from shortcutflow.objectives.pairs import end_of_flow
from shortcutflow.objectives.regression import as_batch
from shortcutflow.path import interpolate, velocity
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import WHOLE, Network, Share, Targets


@dataclass(frozen=True)
class ReflowDraw:
    """The random numbers of one evaluation: n pairs, each in b/n rows; row i is of pair i modulo n.

    Attributes:
        noise: x_0, (n, *shape).
        t: (b,) float32.
        dropped: (n,) bool, pairs that lose their condition.
    """

    noise: Tensor
    t: Tensor
    dropped: Tensor


class ReflowObjective(TrainingObjective):
    """Flow matching whose samples are the teacher's, made anew for each batch; the data give shapes and conditions.

    >>> objective = ReflowObjective(teacher_steps=128)
    >>> report = objective(net, data, labels, teacher=flow_net, generator=g)

    The released code has no file for it; it trains "live reflow" only. The network is told d = 0 as in flow matching.

    Args:
        teacher_steps: Euler steps that make a pair.
        rows_per_pair: rows of a batch, each with its own t, that use one pair; 4 divide the teacher's cost by 4.
        guidance_scale: classifier-free guidance of the teacher; 1 is none.
        condition_dropout: share of pairs made and trained with the null condition.
        sigma_min: share of the noise left at t = 1.
    """

    kind: Literal["reflow"] = "reflow"
    teacher_steps: int = Field(default=128, ge=1, description="Euler steps of the teacher that make a pair")
    rows_per_pair: int = Field(default=1, ge=1, description="rows of a batch that use one pair")
    guidance_scale: GuidanceScale = 1.0

    @property
    def needs_teacher(self) -> bool:
        """True: a network trained by flow matching."""
        return True

    @property
    def tells_step_size(self) -> bool:
        """False: it knows a flow alone, if a straighter one."""
        return False

    def target_evaluations(self, batch_size: int) -> float:
        """The teacher's steps on each pair."""
        return self.teacher_steps * guided_evaluations(self.guidance_scale) / self.rows_per_pair

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> ReflowDraw:
        """Noise of the pairs, times and dropped conditions; ``progress`` is not used.

        Raises:
            ValueError: for a batch that rows_per_pair does not divide, or shares that would have to make the same pair.
        """
        b, device = len(data) * share.total, data.device
        if b % self.rows_per_pair:
            raise ValueError(f"a batch of {b} cannot be made of pairs of {self.rows_per_pair} rows each")
        n = b // self.rows_per_pair
        if n % share.total:
            raise ValueError(
                f"{n} pairs of several rows cannot be shared by {share.total} processes: "
                "use a batch size that both divide, or rows_per_pair=1"
            )
        generator = generator_or_default(generator, device)
        return ReflowDraw(
            noise=noise_for(data[: n // share.total], generator, share),
            t=torch.rand(b, generator=generator, device=device)[share.rows],
            dropped=self.draw_dropped(n, generator, device)[share.rows],
        )

    @torch.no_grad()
    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: ReflowDraw,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """v = end - x_0 on the line of each of the teacher's pairs; ``net`` is not called.

        A pair has the condition of the first of its rows.

        Raises:
            ValueError: without a teacher.
        """
        data, y = as_batch(net, data, y)
        teacher = require_teacher(teacher, self.kind)
        n, noise = len(draw.noise), draw.noise
        y = self.drop(y[:n] if y is not None else None, draw.dropped, null_y)
        end = end_of_flow(
            teacher, noise, y, steps=self.teacher_steps, told=0.0, scale=self.guidance_scale, null_y=null_y
        )
        copies = len(draw.t) // n
        noise, end = torch.cat([noise] * copies), torch.cat([end] * copies)
        return Targets(
            x_t=interpolate(noise, end, draw.t, self.sigma_min),
            t=draw.t,
            d=torch.zeros_like(draw.t),
            y=torch.cat([y] * copies) if y is not None else None,
            v=velocity(noise, end, self.sigma_min),
        )
