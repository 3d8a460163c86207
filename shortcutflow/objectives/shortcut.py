"""Shortcut models (Frans, Hafner, Levine, Abbeel, "One Step Diffusion via Shortcut Models", arXiv 2410.12557).

A row of size d > 1/M is taught to make in one step what two steps of size d/2 do (the paper's eq. 4; its second
step stands at t + d/2, a slip in print):

    s(x_t, t, d)  <-  ( s(x_t, t, d/2) + s(x', t + d/2, d/2) ) / 2,     x' = x_t + (d/2) s(x_t, t, d/2)

and the rows at d = 1/M follow the flow, s(x_t, t, 1/M) <- x_1 - x_0 (eq. 5, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from shortcutflow.guidance import partly_guided_velocity, predict
from shortcutflow.objectives.objective import (
    FinestSteps,
    GuidanceScale,
    TrainingObjective,
    magnitudes,
    noise_for,
    require_progress,
    require_shared_evenly,
    require_teacher,
)
from shortcutflow.objectives.regression import as_batch, rows_of
from shortcutflow.objectives.released import released_bootstrap_sizes, released_guided_rows
from shortcutflow.objectives.shortcut_draw import ShortcutDraw
from shortcutflow.path import check_unit_interval, expand_to, interpolate, velocity
from shortcutflow.schedule import draw_bootstrap_sizes, draw_times_on_grid, levels_of
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import WHOLE, Mean, Network, Share, Targets


class ShortcutObjective(TrainingObjective):
    """The self-consistency objective of shortcut models.

    >>> objective = ShortcutObjective(finest_steps=128, bootstrap_fraction=0.25)
    >>> report = objective(net, data, labels, target_net=ema_net, generator=g)
    >>> report.loss.backward()

    Every sample of the batch makes exactly one row: the first ``floor(bootstrap_fraction * b)`` bootstrap rows, the
    others flow rows (batches are shuffled by whoever makes them). :meth:`released` rebuilds the released code's rows.

    Args:
        finest_steps: M, a power of two: the smallest step is 1/M and stands for the flow.
        bootstrap_fraction: k, share of the batch trained on self-consistency (paper 1/4, released code 1/8).
        guidance_scale: classifier-free guidance of the half steps at d = 1/M, which larger steps inherit; guiding at
            every size would compound. 1 is none.
        condition_dropout: share of rows, of both kinds, trained on the null condition.
        clip: bound on the state between the half steps and on the target; None for none.
        sigma_min: share of the noise left at t = 1.
        rows: "each_once" as above; "released" and "released_dt_bias" as the released code builds them.
        bootstrap_from, guidance_from: shares of the training before which all rows are flow rows, or no target is
            guided: the stages in which a trained flow is made a shortcut model.
        flow_of: whose flow steps of 1/M follow. "data": x_1 - x_0 as in eq. 5. "teacher": a frozen network's velocity
            at x_t, which is their mean already; it makes the half steps of 1/M as well, so targets stand on it alone.
    """

    kind: Literal["shortcut"] = "shortcut"
    finest_steps: FinestSteps = 128
    bootstrap_fraction: float = Field(default=0.25, ge=0, le=1, description="k: share of self-consistency rows")
    guidance_scale: GuidanceScale = 1.0
    clip: float | None = Field(default=None, gt=0, description="bound on half-way states and targets")
    rows: Literal["each_once", "released", "released_dt_bias"] = "each_once"
    bootstrap_from: float = Field(default=0.0, ge=0, lt=1, description="share of the training with flow rows only")
    guidance_from: float = Field(default=0.0, ge=0, lt=1, description="share of the training with unguided targets")
    flow_of: Literal["data", "teacher"] = "data"

    @model_validator(mode="after")
    def _parts_fit(self) -> ShortcutObjective:
        if self.rows != "each_once" and (self.flow_of == "teacher" or self.bootstrap_from or self.guidance_from):
            raise ValueError(f"rows {self.rows!r} are the released code's, which knows neither a teacher nor stages")
        return self

    @classmethod
    def released(
        cls,
        *,
        denoise_timesteps: int = 128,
        bootstrap_every: int = 8,
        bootstrap_cfg: bool = False,
        bootstrap_dt_bias: bool = False,
        cfg_scale: float = 4.0,
        class_dropout_prob: float = 0.1,
    ) -> ShortcutObjective:
        """The released code's targets, number for number, under its own names of the switches.

        b // bootstrap_every bootstrap rows made from the first images, which the flow rows use again while the last
        images go unused; left-over rows at d = 1; labels dropped on flow rows only; guidance at the finest
        bootstrapped size only; states and targets clipped at +-4; 1e-5 of the noise left at t = 1. Its
        ``bootstrap_ema`` is the choice of ``target_net`` here, and ``force_t`` and ``force_dt`` are arguments of
        :meth:`draw_released`.
        """
        return cls(
            finest_steps=denoise_timesteps,
            bootstrap_fraction=1 / bootstrap_every,
            guidance_scale=cfg_scale if bootstrap_cfg else 1.0,
            condition_dropout=class_dropout_prob,
            clip=4.0,
            sigma_min=1e-5,
            rows="released_dt_bias" if bootstrap_dt_bias else "released",
        )

    @property
    def tells_step_size(self) -> bool:
        """True: such a network may be told any step size when it is sampled."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """Whether its flow is that of a trained network."""
        return self.flow_of == "teacher"

    def target_evaluations(self, batch_size: int) -> float:
        """Two half steps on each bootstrap row, again without condition on those that may be guided, and a teacher's
        part; the mean over all stages.
        """
        n = self.n_bootstrap(batch_size)
        bootstrapped, guided = 1 - self.bootstrap_from, 1 - max(self.bootstrap_from, self.guidance_from)
        of_net = 2 * n * bootstrapped + 2 * self._n_may_be_guided(n) * guided
        of_teacher = 0.0
        if self.flow_of == "teacher":
            of_teacher = batch_size - n * bootstrapped + 2 * self._n_at_finest(n) * bootstrapped
        return (of_net + of_teacher) / batch_size

    def n_bootstrap(self, batch_size: int) -> int:
        """How many of batch_size rows are bootstrap rows.

        Raises:
            ValueError: if bootstrap_fraction asks for some and the batch is too small to hold one.
        """
        return rows_of(self.bootstrap_fraction, batch_size, "bootstrap")

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> ShortcutDraw:
        """Noise, times, step sizes and dropped conditions for a batch of data (b, *shape).

        Raises:
            ValueError: with stages and without progress, the share of the training that is done; if a share would have
                no bootstrap row while another has, or rows that use another's samples.
        """
        if self.rows != "each_once":
            return self.draw_released(data, generator=generator, share=share)
        b, device, M = len(data) * share.total, data.device, self.finest_steps
        n = self.n_bootstrap(b) if self._has_begun(self.bootstrap_from, progress) else 0
        require_shared_evenly(n, share, "bootstrap", exactly=False)
        generator = generator_or_default(generator, device)
        noise = noise_for(data, generator, share)
        d = torch.full((b,), 1 / M, device=device)
        if n > 0:
            d[:n] = draw_bootstrap_sizes(n, M, generator=generator, device=device)
        t = draw_times_on_grid(b, d, generator=generator, device=device)
        d, n_here = d[share.rows], share.rows_among_first(n)
        n_guided = self._n_may_be_guided(n) if self._has_begun(self.guidance_from, progress) else 0
        return ShortcutDraw(
            noise=noise,
            t=t[share.rows],
            d=d,
            dropped=self.draw_dropped(b, generator, device)[share.rows],
            n_bootstrap=n_here,
            # Sizes come finest first.
            guided=self._is_finest(d[:n_here]),
            n_may_be_guided=share.rows_among_first(n_guided),
        )

    def _is_finest(self, d: Tensor) -> Tensor:
        """Which bootstrap rows have d = 2/M, whose half steps are the flow's."""
        return (d * self.finest_steps).round() == 2

    def _has_begun(self, stage: float, progress: float | None) -> bool:
        return stage == 0 or require_progress(progress, self.kind) >= stage

    def _n_may_be_guided(self, n: int) -> int:
        if self.guidance_scale == 1:
            return 0
        if self.rows != "each_once":
            return released_guided_rows(n, self.finest_steps, bias=self.rows == "released_dt_bias")
        return self._n_at_finest(n)

    def _n_at_finest(self, n: int) -> int:
        """At most so many of n rows have d = 2/M: each size has at most one row more than its share."""
        return min(n, n // levels_of(self.finest_steps) + 1)

    def draw_released(
        self,
        data: Tensor,
        *,
        force_t: float | None = None,
        force_d: float | None = None,
        generator: Generator | None = None,
        share: Share = WHOLE,
    ) -> ShortcutDraw:
        """The released code's rows: its order, its reuse of images, its remainder at d = 1.

        Args:
            force_t: use this time in all rows instead of drawn ones.
            force_d: use this step size in all bootstrap rows.
        """
        b, device = len(data) * share.total, data.device
        n = self.n_bootstrap(b)
        require_shared_evenly(n, share, "bootstrap", exactly=True)
        generator = generator_or_default(generator, device)
        noise_bootstrap = noise_for(data[: n // share.total], generator, share)
        d = released_bootstrap_sizes(n, self.finest_steps, bias=self.rows == "released_dt_bias", device=device)
        if force_d is not None:
            d = torch.full_like(d, force_d)
        t_bootstrap = draw_times_on_grid(n, d, generator=generator, device=device)
        noise_flow = noise_for(data, generator, share)
        t_flow = draw_times_on_grid(b, 1 / self.finest_steps, generator=generator, device=device)
        if force_t is not None:
            t_bootstrap, t_flow = torch.full_like(t_bootstrap, force_t), torch.full_like(t_flow, force_t)
        here, dropped = share.rows, self.draw_dropped(b, generator, device)
        return self.released_rows(
            t_bootstrap[here], d[here], noise_bootstrap, t_flow[here], noise_flow, dropped[here], share=share
        )

    def released_rows(
        self,
        t_bootstrap: Tensor,
        d_bootstrap: Tensor,
        noise_bootstrap: Tensor,
        t_flow: Tensor,
        noise_flow: Tensor,
        dropped: Tensor,
        *,
        share: Share = WHOLE,
    ) -> ShortcutDraw:
        """Merge the released code's two sets of draws, of n bootstrap and b flow rows, into its b rows.

        Of a share of a batch all are the share's rows: since shares divide n, they merge among themselves.
        """
        n, b = len(t_bootstrap), len(t_flow)
        kept = slice(b - n)
        image = torch.arange(b, device=t_flow.device)
        d_flow = torch.full((b - n,), 1 / self.finest_steps, device=t_flow.device)
        in_all = n * share.total
        n_guided = released_guided_rows(in_all, self.finest_steps, bias=self.rows == "released_dt_bias")
        return ShortcutDraw(
            noise=torch.cat([noise_bootstrap, noise_flow[kept]]),
            t=torch.cat([t_bootstrap, t_flow[kept]]),
            d=torch.cat([d_bootstrap, d_flow]),
            dropped=torch.cat([torch.zeros_like(dropped[:n]), dropped[kept]]),
            n_bootstrap=n,
            guided=image[:n] < share.rows_among_first(n_guided),
            n_may_be_guided=share.rows_among_first(self._n_may_be_guided(in_all)),
            source=torch.cat([image[:n], image[kept]]),
        )

    @torch.no_grad()
    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: ShortcutDraw,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """The rows of the regression, from a network that is asked for two half steps on the bootstrap rows.

        Args:
            net: gives the bootstrap targets: the EMA of the weights, or the weights themselves.
            data: x_1, (b, *shape).
            y: condition, (b, ...) or None.
            draw: what :meth:`draw` returned, or numbers of your own.
            teacher: the network whose flow is followed, with ``flow_of="teacher"``; called with d = 0,
                which is the flow of any network, whatever its own M.
            null_y: the null condition, for dropped rows and guidance.

        Raises:
            ValueError: for shapes that do not fit together, times or sizes outside [0, 1], a missing null_y or teacher.
        """
        data, y = as_batch(net, data, y)
        if self.flow_of == "teacher":
            teacher = require_teacher(teacher, "a shortcut model with flow_of='teacher'")
        else:
            teacher = None
        check_unit_interval(draw.d, "d")
        if draw.source is not None:
            data = data[draw.source]
            y = y[draw.source] if y is not None else None
        y = self.drop(y, draw.dropped, null_y)
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        v = velocity(draw.noise, data, self.sigma_min)
        n = draw.n_bootstrap
        if teacher is not None:
            # A share without flow rows calls the teacher too, on one row in vain: if it is sharded all must call it.
            first = min(n, len(x_t) - 1)
            flow = torch.zeros_like(draw.d)
            followed = predict(teacher, x_t[first:], draw.t[first:], flow[first:], y[first:] if y is not None else y)
            v = torch.cat([v[:n], followed[n - first :].to(v.dtype)])
        if n == 0:
            return Targets(x_t, draw.t, draw.d, y, v, source=draw.source)
        half_step = self._half_step_of(net, teacher, y[:n] if y is not None else None, draw, null_y)
        bootstrap_v, metrics = self._two_half_steps(half_step, x_t[:n], draw)
        v = torch.cat([bootstrap_v.to(v.dtype), v[n:]])
        metrics |= magnitudes(flow=v[n:])
        return Targets(x_t, draw.t, draw.d, y, v, n, metrics, draw.source)

    def _two_half_steps(
        self, half_step: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, draw: ShortcutDraw
    ) -> tuple[Tensor, dict[str, Mean]]:
        """The average velocity of two steps of size d/2 from x_t, and the root mean squares of its parts."""
        t, half = draw.t[: len(x_t)], draw.d[: len(x_t)] / 2
        v1 = half_step(x_t, t)
        x_half_way = self._clipped(x_t + expand_to(half, x_t) * v1).to(x_t.dtype)
        v2 = half_step(x_half_way, t + half)
        v = self._clipped((v1 + v2) / 2)
        return v, magnitudes(bootstrap=v, b1=v1, b2=v2)

    def _half_step_of(
        self, net: Network, teacher: Network | None, y: Tensor | None, draw: ShortcutDraw, null_y: Tensor | float | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity (n, *shape) of a step of size d/2 from states (n, *shape) at times (n,)."""
        n = draw.n_bootstrap
        half = draw.d[:n] / 2

        def of_net(x: Tensor, t: Tensor) -> Tensor:
            return partly_guided_velocity(
                net, x, t, half, y,
                guided=draw.guided, at_most=draw.n_may_be_guided, scale=self.guidance_scale, null_y=null_y,
            )  # fmt: skip

        if teacher is None:
            return of_net
        # Sizes come finest first; how many rows have it differs from draw to draw, this bound does not.
        head = slice(self._n_at_finest(n))
        y_head = y[head] if y is not None else None
        at_finest = self._is_finest(draw.d[head])
        flow = torch.zeros_like(half[head])

        def of_both(x: Tensor, t: Tensor) -> Tensor:
            v = predict(net, x, t, half, y)
            followed = partly_guided_velocity(
                teacher, x[head], t[head], flow, y_head,
                guided=draw.guided[head], at_most=draw.n_may_be_guided, scale=self.guidance_scale, null_y=null_y,
            )  # fmt: skip
            mask = at_finest.view(-1, *(1,) * (x.ndim - 1))
            chosen = torch.where(mask, followed.to(v.dtype), v[head])
            return torch.cat([chosen, v[head.stop :]])

        return of_both

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)
