"""Reflow (Liu, Gong, Liu 2022, "Flow Straight and Fast") and live reflow (a baseline of the shortcut paper).

Where flow matching pairs any noise with any sample, so that its lines cross and its flow bends, reflow pairs each noise
with the end of its own trajectory. Such lines cross less, and a straighter flow needs fewer steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.conditions import Condition, NullCondition, concatenate, select
from shortcutflow.guidance import guided_velocity
from shortcutflow.objectives.objective import (
    NO_CONTEXT,
    Context,
    Draw,
    FinestSteps,
    GuidanceScale,
    Objective,
    count_of,
    guided_evaluations,
    noise_like,
    require_no_noise,
    require_sliced_evenly,
    require_teacher,
)
from shortcutflow.objectives.released import live_reflow_rows
from shortcutflow.path import interpolate, velocity
from shortcutflow.schedule import draw_times_on_grid
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import Network, SamplerKind, Targets


class ReflowObjective(Objective):
    """Flow matching whose samples are the teacher's, made anew for each batch; the data give shapes and conditions.

    >>> objective = ReflowObjective(teacher_steps=128)
    >>> report = objective(net, data, labels, teacher=flow_net, generator=g)

    The released code has no file for it; it trains "live reflow" only. The network is given d = 0 as in flow matching.

    Args:
        teacher_steps: Euler steps that make a pair.
        rows_per_pair: rows of a batch, each with its own t, that use one pair; 4 divide the teacher's cost by 4.
        guidance_scale: classifier-free guidance of the teacher; 1 is none.
        condition_dropout: fraction of pairs made and trained with the null condition.
        sigma_min: fraction of the noise left at t = 1.
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
    def step_conditioned(self) -> bool:
        """False: it knows a flow alone, if a straighter one."""
        return False

    @property
    def targets_in_graph(self) -> bool:
        """False: the steps that make a pair are a loop, of which a graph would hold each."""
        return False

    def target_evaluations(self, batch_size: int) -> float:
        """The teacher's steps on each pair."""
        return self.teacher_steps * guided_evaluations(self.guidance_scale) / self.rows_per_pair

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Times (b,); noise (n, *shape) and dropped conditions (n,) of n pairs: row i is of pair i modulo n.

        Raises:
            ValueError: for a batch that rows_per_pair does not divide, or slices that would have to make the same pair.
        """
        b, device, slices = context.batch_size(data), data.device, context.batch_slice.count
        require_no_noise(context, "reflow's pairs")
        if b % self.rows_per_pair:
            raise ValueError(f"a batch of {b} cannot be made of pairs of {self.rows_per_pair} rows each")
        n = b // self.rows_per_pair
        if n % slices:
            raise ValueError(
                f"{n} pairs of several rows cannot be shared by {slices} processes: "
                "use a batch size that both divide, or rows_per_pair=1"
            )
        generator = generator_or_default(generator, device)
        noise = noise_like(data[: n // slices], generator, context)
        t = torch.rand(b, generator=generator, device=device)
        return Draw(noise, t, torch.zeros_like(t), self.draw_dropped(n, generator, device)).at(context.batch_slice)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """v = end - x_0 on the line of each of the teacher's pairs; no other network is called.

        A pair has the condition of the first of its rows.

        Raises:
            ValueError: without a teacher.
        """
        teacher = require_teacher(context.teacher, self.kind)
        n, noise = len(draw.noise), draw.noise
        _, y = self.row_inputs(net, data[:n], select(y, slice(n)), draw, context)
        end = euler_solve(
            teacher, noise, y, steps=self.teacher_steps, d_cond=0.0, scale=self.guidance_scale, null_y=context.null_y
        )
        copies = len(draw.t) // n
        noise, end = torch.cat([noise] * copies), torch.cat([end] * copies)
        x_t = interpolate(noise, end, draw.t, self.sigma_min)
        return Targets(x_t, draw.t, draw.d, concatenate(*[y] * copies), velocity(noise, end, self.sigma_min))


class LiveReflowObjective(Objective):
    """Flow matching, and reflow from the network's own flow at once.

    >>> objective = LiveReflowObjective(finest_steps=128, reflow_fraction=0.25)
    >>> report = objective(net, data, labels, target_net=ema_net, generator=g)

    Flow rows teach the network a flow, at d = 1/M. From it the network itself makes pairs of noise and sample, and on
    their lines it learns the straightened flow, at d = 1. There d is a name for one of two flows, not the length of a
    step.

    Every sample makes exactly one row: the first ``floor(reflow_fraction * b)`` give a reflow row its condition, the
    others make flow rows. :meth:`released` rebuilds the released code's rows.

    Args:
        finest_steps: M, a power of two: flow rows have d = 1/M.
        reflow_fraction: fraction of the batch that are reflow rows.
        generation_steps: Euler steps that make a pair.
        guidance_scale: classifier-free guidance of these steps; 1 is none.
        condition_dropout: fraction of rows, of both kinds, trained on the null condition.
        sigma_min: fraction of the noise left at t = 1.
        rows: "each_once" as above; "released" as the released code builds them.
    """

    kind: Literal["live_reflow"] = "live_reflow"
    finest_steps: FinestSteps = 128
    reflow_fraction: float = Field(default=0.25, ge=0, le=1, description="share of reflow rows")
    generation_steps: int = Field(default=8, ge=1, description="Euler steps that make a pair")
    guidance_scale: GuidanceScale = 1.0
    rows: Literal["each_once", "released"] = "each_once"

    @classmethod
    def released(
        cls,
        *,
        denoise_timesteps: int = 128,
        bootstrap_every: int = 8,
        cfg_scale: float = 4.0,
        class_dropout_prob: float = 0.1,
    ) -> LiveReflowObjective:
        """The released code's ``train_type=livereflow``.

        b // bootstrap_every reflow rows with the labels of the first images and the noise of the first flow rows, which
        use these images too, while the last images go unused; labels dropped on flow rows only; a cfg_scale of 0 makes
        pairs with the null label but trains them with their own; 1e-5 of the noise left at t = 1. The pairs come from
        the current weights: pass no ``target_net``.
        """
        return cls(
            finest_steps=denoise_timesteps,
            reflow_fraction=1 / bootstrap_every,
            guidance_scale=cfg_scale,
            condition_dropout=class_dropout_prob,
            sigma_min=1e-5,
            rows="released",
        )

    @property
    def sampler(self) -> SamplerKind:
        """The straightened flow below M steps, the other from M steps on."""
        return "live_reflow"

    @property
    def targets_in_graph(self) -> bool:
        """False: the steps that make a pair are a loop, of which a graph would hold each."""
        return False

    def target_evaluations(self, batch_size: int) -> float:
        """The steps that make a pair, on each reflow row."""
        steps = self.generation_steps * guided_evaluations(self.guidance_scale)
        return steps * self.n_reflow(batch_size) / batch_size

    def n_reflow(self, batch_size: int) -> int:
        """How many of batch_size rows are reflow rows.

        Raises:
            ValueError: if there should be some and the batch is too small to hold one.
        """
        return count_of(self.reflow_fraction, batch_size, "reflow")

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times and dropped conditions for a batch of data (b, *shape).

        Raises:
            ValueError: if a slice would have no reflow row while another has, or rows that use another's samples.
        """
        b, device, here = context.batch_size(data), data.device, context.batch_slice
        n = self.n_reflow(b)
        require_sliced_evenly(n, here, "reflow", exactly=self.rows != "each_once")
        generator = generator_or_default(generator, device)
        flow = self.draw_steps(data, 1 / self.finest_steps, generator, context)
        if self.rows == "each_once":
            n = here.count_below(n)
            return replace(flow, d=torch.cat([torch.ones_like(flow.d[:n]), flow.d[n:]]), n_bootstrap=n)
        t_reflow = draw_times_on_grid(n, 1 / self.finest_steps, generator=generator, device=device)[here.rows]
        return live_reflow_rows(t_reflow, flow.t, flow.noise, flow.dropped, self.finest_steps)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """The rows of the regression; the target network makes the pairs of the reflow rows."""
        end, y = self.row_inputs(net, data, y, draw, context)
        n = draw.n_bootstrap
        if n > 0:
            made = euler_solve(
                context.target_network(net), draw.noise[:n], select(y, slice(n)), steps=self.generation_steps,
                d_cond=1 / self.finest_steps, scale=self.guidance_scale, null_y=context.null_y,
            )  # fmt: skip
            end = torch.cat([made, end[n:]])
        return Targets(
            x_t=interpolate(draw.noise, end, draw.t, self.sigma_min),
            t=draw.t,
            d=draw.d,
            y=y,
            # A pair keeps none of its noise, in the released code neither.
            v=torch.cat([velocity(draw.noise[:n], end[:n]), velocity(draw.noise[n:], end[n:], self.sigma_min)]),
            n_bootstrap=n,
            source=draw.source,
        )


@torch.no_grad()
def euler_solve(
    net: Network,
    noise: Tensor,
    y: Condition,
    *,
    steps: int,
    d_cond: float,
    scale: float,
    null_y: NullCondition = None,
) -> Tensor:
    """Where equal Euler steps along a network's flow lead from noise: the other half of the pairs, (n, *shape).

    Args:
        net: the network.
        noise, y: n rows of x_0 and of their conditions.
        steps: how many; each is one evaluation.
        d_cond: the step size that the network is given: what stands for the flow in its training.
        scale: of classifier-free guidance; 1 is none.
        null_y: the null condition, for guidance.
    """
    x_t = noise
    d = torch.full((len(noise),), d_cond, device=noise.device)
    for i in range(steps):
        t = torch.full_like(d, i / steps)
        x_t = x_t + guided_velocity(net, x_t, t, d, y, scale=scale, null_y=null_y).to(x_t.dtype) / steps
    return x_t
