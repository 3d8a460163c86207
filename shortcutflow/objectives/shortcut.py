"""Shortcut models (Frans, Hafner, Levine, Abbeel, "One Step Diffusion via Shortcut Models", arXiv 2410.12557).

A row of size d > 1/M is taught to make in one step what two steps of size d/2 do (the paper's eq. 4; its second
step stands at t + d/2, a slip in print):

    s(x_t, t, d)  <-  ( s(x_t, t, d/2) + s(x', t + d/2, d/2) ) / 2,     x' = x_t + (d/2) s(x_t, t, d/2)

and the rows at d = 1/M follow the flow, s(x_t, t, 1/M) <- x_1 - x_0 (eq. 5, Algorithm 1). Both are in
:meth:`ShortcutObjective.targets`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from shortcutflow.conditions import Condition, NullCondition, select
from shortcutflow.guidance import guided_velocity, predict
from shortcutflow.objectives.objective import (
    NO_CONTEXT,
    Context,
    Draw,
    FinestSteps,
    GuidanceScale,
    Step,
    TimeSteps,
    clipped,
    count_of,
    require_progress,
    require_sliced_evenly,
    require_teacher,
    rms_metrics,
    two_legs,
)
from shortcutflow.objectives.plug_in import FlowObjective
from shortcutflow.objectives.released import draw_shortcut_rows, released_guided_rows
from shortcutflow.path import check_unit_interval
from shortcutflow.schedule import TimeDensity, draw_bootstrap_sizes, draw_times, levels_of, to_grid
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import Network, Targets

NOT_RELEASED = (
    "bootstrap_from", "guidance_from", "flow_of", "time_density", "time_steps", "bootstrap_weight",
    "first_bootstrap_fraction", "plug_in_groups",
)  # fmt: skip
"""Settings of :class:`ShortcutObjective` that the released code's rows do not have."""


class ShortcutObjective(FlowObjective):
    """The self-consistency objective of shortcut models.

    >>> objective = ShortcutObjective(finest_steps=128, bootstrap_fraction=0.25)
    >>> report = objective(net, data, labels, target_net=ema_net, generator=g)
    >>> report.loss.backward()

    Every sample of the batch makes exactly one row: the first ``floor(bootstrap_fraction * b)`` bootstrap rows, the
    others flow rows (batches arrive shuffled). :meth:`released` rebuilds the released code's rows.

    Args:
        finest_steps: M, a power of two: the smallest step is 1/M and stands for the flow.
        bootstrap_fraction: k, fraction of the batch trained on self-consistency (paper 1/4, released code 1/8).
        guidance_scale: classifier-free guidance of the half steps at d = 1/M, which larger steps inherit; guiding at
            every size would compound. 1 is none.
        condition_dropout: fraction of rows, of both kinds, trained on the null condition.
        clip: bound on the state between the half steps and on the target; None for none.
        sigma_min: fraction of the noise left at t = 1.
        rows: "each_once" as above; "released" and "released_dt_bias" as the released code builds them.
        bootstrap_from, guidance_from: fractions of the training before which all rows are flow rows, or no target is
            guided: the stages in which a trained flow is made a shortcut model.
        flow_of: whose flow steps of 1/M follow. "data": x_1 - x_0 as in eq. 5. "teacher": a frozen network's velocity
            at x_t, which is their mean already; it makes the half steps of 1/M as well, so targets stand on it alone.
        time_density: of the times of flow rows, before they are rounded down to their grid; None is uniform.
        time_steps: T, a power of two: the times of flow rows are multiples of 1/T; None is M. A small M with T = 128
            spares the network the smallest steps, and still shows it the flow at all 128 times.
        bootstrap_weight: of each bootstrap row in the loss; a flow row has 1.
        first_bootstrap_fraction: the share of bootstrap rows grows evenly, from this where they begin (bootstrap_from)
            to bootstrap_fraction at the end of the training; None is the same share throughout. The shapes of target
            calls change with it, so a compiled network is compiled again, for dynamic shapes.
        plug_in_groups: see :class:`shortcutflow.objectives.plug_in.FlowObjective`.
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
    time_density: TimeDensity = None
    time_steps: TimeSteps = None
    bootstrap_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="weight of a bootstrap row")
    first_bootstrap_fraction: float | None = Field(
        default=None, gt=0, le=1, description="k at first, which then grows to bootstrap_fraction"
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> ShortcutObjective:
        if self.rows != "each_once":
            changed = [name for name in NOT_RELEASED if getattr(self, name) != type(self).model_fields[name].default]
            if changed:
                raise ValueError(
                    f"rows {self.rows!r} are the released code's, which knows no {', '.join(changed)}: "
                    'leave them out, or use rows "each_once"'
                )
        if self.flow_of == "teacher" and self.plug_in_groups is not None:
            raise ValueError("flow_of='teacher' has the flow's mean velocity already: leave out plug_in_groups")
        if (self.first_bootstrap_fraction or 0) > self.bootstrap_fraction:
            raise ValueError(
                f"first_bootstrap_fraction {self.first_bootstrap_fraction:g} grows to bootstrap_fraction, so it must "
                f"not be above that, {self.bootstrap_fraction:g}"
            )
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
        :func:`shortcutflow.objectives.released.draw_shortcut_rows`.
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
    def needs_teacher(self) -> bool:
        """Whether its flow is that of a trained network."""
        return self.flow_of == "teacher"

    @property
    def has_fixed_shapes(self) -> bool:
        """False if there are more and more bootstrap rows."""
        return self.first_bootstrap_fraction is None

    def target_evaluations(self, batch_size: int) -> float:
        """Two half steps on each bootstrap row, again without condition on those that may be guided, and a teacher's
        part; the mean over the training.
        """
        fewest, begin = self._fewest_bootstrap(batch_size), self.bootstrap_from
        more = self.n_bootstrap(batch_size) - fewest
        # Where a stage begins, and where one more row becomes a bootstrap row.
        changes = {begin, self.guidance_from, *(begin + (1 - begin) * (i + 0.5) / more for i in range(more))}
        parts = pairwise(sorted({0.0, 1.0, *changes}))
        rows = sum((end - start) * self._rows_evaluated(batch_size, (start + end) / 2) for start, end in parts)
        return rows / batch_size

    def _rows_evaluated(self, batch_size: int, progress: float) -> int:
        n = self.n_bootstrap(batch_size, progress)
        rows = 2 * n + (2 * self._max_guided(n) if progress >= self.guidance_from else 0)
        return rows if self.flow_of == "data" else rows + batch_size - n + 2 * self._max_finest(n)

    def n_bootstrap(self, batch_size: int, progress: float | None = 1.0) -> int:
        """How many of batch_size rows are bootstrap rows, by default at the end of the training.

        Raises:
            ValueError: if there should be some and the batch is too small to hold one; where they become more, without
                progress.
        """
        if not self._has_begun(self.bootstrap_from, progress):
            return 0
        n = count_of(self.bootstrap_fraction, batch_size, "bootstrap")
        fewest = self._fewest_bootstrap(batch_size)
        if fewest == n:
            return n
        done = (require_progress(progress, self.kind) - self.bootstrap_from) / (1 - self.bootstrap_from)
        return round(fewest + done * (n - fewest))

    def _fewest_bootstrap(self, batch_size: int) -> int:
        first = self.first_bootstrap_fraction
        return count_of(self.bootstrap_fraction if first is None else first, batch_size, "bootstrap")

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times, step sizes and dropped conditions for a batch of data (b, *shape).

        Raises:
            ValueError: with stages and without progress, the fraction of the training that is done; if a slice would
                have no bootstrap row while another has, or rows that use another's samples.
        """
        b, device, M = context.batch_size(data), data.device, self.finest_steps
        n = self.n_bootstrap(b, context.progress)
        if self.rows != "each_once":
            return draw_shortcut_rows(
                data, n, generator, context,
                finest_steps=M, condition_dropout=self.condition_dropout, bias=self.rows == "released_dt_bias",
            )  # fmt: skip
        if n > 0:  # of any later step there are enough too
            require_sliced_evenly(self._fewest_bootstrap(b), context.batch_slice, "bootstrap", exactly=False)
        generator = generator_or_default(generator, device)
        noise = self.draw_noise(data, generator, context)
        d = torch.full((b,), 1 / M, device=device)
        if n > 0:
            d[:n] = draw_bootstrap_sizes(n, M, generator=generator, device=device)
        t = draw_times(b, density=self.time_density, first_uniform=n, generator=generator, device=device)
        grid = d if self.time_steps is None else torch.cat([d[:n], torch.full_like(d[n:], 1 / self.time_steps)])
        dropped = self.draw_dropped(b, generator, device)
        max_guided = self._max_guided(n) if self._has_begun(self.guidance_from, context.progress) else 0
        # Sizes come finest first, so the guided rows do.
        draw = Draw(noise, to_grid(t, grid), d, dropped, n, guided=self._is_finest(d[:n]), max_guided=max_guided)
        return draw.at(context.batch_slice)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """Flow rows (eq. 5) and bootstrap rows (eq. 4), the latter from two half steps of the target network.

        With ``flow_of="teacher"`` the teacher is called with d = 0, which is the flow of any network, whatever its M.

        Raises:
            ValueError: for shapes that do not fit together, times or sizes outside [0, 1], a missing null_y or teacher.
        """
        teacher = require_teacher(context.teacher, "flow_of='teacher'") if self.flow_of == "teacher" else None
        check_unit_interval(draw.d, "d")
        x_t, v, y = self.path_rows(net, data, y, draw, context)
        n = draw.n_bootstrap
        if teacher is not None:
            # A slice without flow rows calls the teacher on one row all the same: all ranks call a sharded one.
            first = min(n, len(x_t) - 1)
            flow = torch.zeros_like(draw.d)
            followed = predict(
                teacher, x_t[first:], draw.t[first:], flow[first:], select(y, slice(first, None))
            )  # fmt: skip
            v = torch.cat([v[:n], followed[n - first :].to(v.dtype)])
        if n == 0:
            return Targets(x_t, draw.t, draw.d, y, v, source=draw.source)
        half_step = self._half_step(context.target_network(net), teacher, select(y, slice(n)), draw, context.null_y)
        v1, v2, v_bootstrap = two_legs(half_step, half_step, x_t[:n], draw.t[:n], draw.d[:n], clip=self.clip)
        v_bootstrap = clipped(v_bootstrap, self.clip)
        metrics = rms_metrics(bootstrap=v_bootstrap, b1=v1, b2=v2, flow=v[n:])
        v = torch.cat([v_bootstrap.to(v.dtype), v[n:]])
        weight = None
        if self.bootstrap_weight != 1:
            weight = torch.ones_like(draw.d)
            weight[:n].fill_(self.bootstrap_weight)
        return Targets(x_t, draw.t, draw.d, y, v, n, metrics, draw.source, weight)

    def _half_step(
        self, net: Network, teacher: Network | None, y: Condition, draw: Draw, null_y: NullCondition
    ) -> Step:
        """The velocity of a step of size d/2, guided and by the teacher where it should be."""
        n = draw.n_bootstrap

        def guided(net: Network, x: Tensor, t: Tensor, d: Tensor, y: Condition) -> Tensor:
            return guided_velocity(
                net, x, t, d, y,
                scale=self.guidance_scale, null_y=null_y, mask=draw.guided, max_guided=draw.max_guided,
            )  # fmt: skip

        if teacher is None:
            return lambda x, t, half: guided(net, x, t, half, y)
        # How many rows have the finest size differs from draw to draw; this bound does not.
        head = slice(self._max_finest(n))
        at_finest, flow = self._is_finest(draw.d[head]), torch.zeros_like(draw.d[head])

        def of_both(x: Tensor, t: Tensor, half: Tensor) -> Tensor:
            v = predict(net, x, t, half, y)
            followed = guided(teacher, x[head], t[head], flow, select(y, head))
            mask = at_finest.view(-1, *(1,) * (x.ndim - 1))
            return torch.cat([torch.where(mask, followed.to(v.dtype), v[head]), v[head.stop :]])

        return of_both

    def _has_begun(self, stage: float, progress: float | None) -> bool:
        return stage == 0 or require_progress(progress, self.kind) >= stage

    def _is_finest(self, d: Tensor) -> Tensor:
        """Which bootstrap rows have d = 2/M, whose half steps are the flow's."""
        return d == 2 / self.finest_steps  # powers of two, which are exact

    def _max_finest(self, n: int) -> int:
        """At most so many of n rows have d = 2/M: each size has at most one row more than its share."""
        return min(n, n // levels_of(self.finest_steps) + 1)

    def _max_guided(self, n: int) -> int:
        if self.guidance_scale == 1:
            return 0
        if self.rows != "each_once":
            return released_guided_rows(n, self.finest_steps, bias=self.rows == "released_dt_bias")
        return self._max_finest(n)
