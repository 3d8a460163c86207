"""Shortcut models (Frans, Hafner, Levine, Abbeel, "One Step Diffusion via Shortcut Models", arXiv 2410.12557).

A row of size d > 1/M is taught to make in one step what two steps of size d/2 do (the paper's eq. 4; its second
step stands at t + d/2, a slip in print):

    s(x_t, t, d)  <-  ( s(x_t, t, d/2) + s(x', t + d/2, d/2) ) / 2,     x' = x_t + (d/2) s(x_t, t, d/2)

and the rows at d = 1/M follow the flow, s(x_t, t, 1/M) <- x_1 - x_0 (eq. 5, Algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor

from shortcutflow.guidance import partly_guided_velocity
from shortcutflow.objectives.regression import ObjectiveSettings, check_batch, regress, rows_of, whole_batch
from shortcutflow.objectives.released import released_bootstrap_sizes, released_guided_rows
from shortcutflow.path import check_unit_interval, expand_to, interpolate, velocity
from shortcutflow.schedule import draw_bootstrap_sizes, draw_times_on_grid, levels_of
from shortcutflow.types import WHOLE, LossReport, Network, Share, Targets


@dataclass(frozen=True)
class ShortcutDraw:
    """The random numbers of one evaluation, a row each: bootstrap rows first, then flow rows.

    Attributes:
        noise: x_0, (r, *shape).
        t, d: (r,) float32; t is a multiple of d.
        dropped: (r,) bool, rows that lose their condition.
        n_bootstrap: how many rows are bootstrap rows.
        source: (r,) int64, the sample each row uses; None means row i uses sample i.
        guided: (n_bootstrap,) bool, rows whose two half steps are guided.
        n_may_be_guided: guided rows lie among the first so many.
    """

    noise: Tensor
    t: Tensor
    d: Tensor
    dropped: Tensor
    n_bootstrap: int
    guided: Tensor
    n_may_be_guided: int
    source: Tensor | None = None

    def of(self, share: Share) -> ShortcutDraw:
        """The rows of a share, bootstrap rows first as in the whole.

        Raises:
            ValueError: if a share would have no bootstrap row while another has, or rows that use another's samples.
        """
        if share.total == 1:
            return self
        n = self.n_bootstrap
        if 0 < n < share.total:
            raise ValueError(f"{n} bootstrap rows cannot be shared by {share.total} processes: use larger batches")
        if self.source is not None and n % share.total:
            raise ValueError(f"the released rows need bootstrap rows that {share.total} shares divide, there are {n}")
        return ShortcutDraw(
            noise=self.noise[share.rows],
            t=self.t[share.rows],
            d=self.d[share.rows],
            dropped=self.dropped[share.rows],
            n_bootstrap=share.rows_among_first(n),
            guided=self.guided[share.rows],
            n_may_be_guided=share.rows_among_first(self.n_may_be_guided),
            # Sample i lies in share i % count, at place i // count there.
            source=None if self.source is None else self.source[share.rows] // share.total,
        )


class ShortcutObjective(ObjectiveSettings):
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
    """

    kind: Literal["shortcut"] = "shortcut"
    finest_steps: int = Field(default=128, description="M: the smallest step size is 1/M")
    bootstrap_fraction: float = Field(default=0.25, ge=0, le=1, description="k: share of self-consistency rows")
    guidance_scale: float = Field(default=1.0, ge=0, description="guidance of the half steps at d = 1/M; 1 is none")
    clip: float | None = Field(default=None, gt=0, description="bound on half-way states and targets")
    rows: Literal["each_once", "released", "released_dt_bias"] = "each_once"

    @field_validator("finest_steps")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        levels_of(value)
        return value

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

    def target_evaluations(self, batch_size: int) -> float:
        """Two half steps on each bootstrap row, and again without condition on those that may be guided."""
        n = self.n_bootstrap(batch_size)
        return 2 * (n + self._n_may_be_guided(n)) / batch_size

    def n_bootstrap(self, batch_size: int) -> int:
        """How many of batch_size rows are bootstrap rows.

        Raises:
            ValueError: if bootstrap_fraction asks for some and the batch is too small to hold one.
        """
        return rows_of(self.bootstrap_fraction, batch_size, "bootstrap")

    def draw(self, data: Tensor, *, generator: Generator | None = None) -> ShortcutDraw:
        """Noise, times, step sizes and dropped conditions for a batch of data (b, *shape)."""
        if self.rows != "each_once":
            return self.draw_released(data, generator=generator)
        b, device, M = len(data), data.device, self.finest_steps
        n = self.n_bootstrap(b)
        d = torch.full((b,), 1 / M, device=device)
        if n > 0:
            d[:n] = draw_bootstrap_sizes(n, M, generator=generator, device=device)
        t = draw_times_on_grid(b, d, generator=generator, device=device)
        return ShortcutDraw(
            noise=torch.randn(data.shape, dtype=data.dtype, generator=generator, device=device),
            t=t,
            d=d,
            dropped=self.draw_dropped(b, generator, device),
            n_bootstrap=n,
            # Sizes come finest first.
            guided=d[:n] == 2 / M,
            n_may_be_guided=self._n_may_be_guided(n),
        )

    def _n_may_be_guided(self, n: int) -> int:
        """Rows at the finest bootstrapped size: each size has at most one row more than its share of n."""
        if self.guidance_scale == 1:
            return 0
        if self.rows != "each_once":
            return released_guided_rows(n, self.finest_steps, bias=self.rows == "released_dt_bias")
        return min(n, n // levels_of(self.finest_steps) + 1)

    def draw_released(
        self,
        data: Tensor,
        *,
        force_t: float | None = None,
        force_d: float | None = None,
        generator: Generator | None = None,
    ) -> ShortcutDraw:
        """The released code's rows: its order, its reuse of images, its remainder at d = 1.

        Args:
            force_t: use this time in all rows instead of drawn ones.
            force_d: use this step size in all bootstrap rows.
        """
        b, device = len(data), data.device
        n = self.n_bootstrap(b)
        d = released_bootstrap_sizes(n, self.finest_steps, bias=self.rows == "released_dt_bias").to(device)
        if force_d is not None:
            d = torch.full_like(d, force_d)
        t_bootstrap = draw_times_on_grid(n, d, generator=generator, device=device)
        t_flow = draw_times_on_grid(b, 1 / self.finest_steps, generator=generator, device=device)
        if force_t is not None:
            t_bootstrap, t_flow = torch.full_like(t_bootstrap, force_t), torch.full_like(t_flow, force_t)
        noise_bootstrap = torch.randn((n, *data.shape[1:]), dtype=data.dtype, generator=generator, device=device)
        noise_flow = torch.randn(data.shape, dtype=data.dtype, generator=generator, device=device)
        return self.released_rows(
            t_bootstrap, d, noise_bootstrap, t_flow, noise_flow, self.draw_dropped(b, generator, device)
        )

    def released_rows(
        self,
        t_bootstrap: Tensor,
        d_bootstrap: Tensor,
        noise_bootstrap: Tensor,
        t_flow: Tensor,
        noise_flow: Tensor,
        dropped: Tensor,
    ) -> ShortcutDraw:
        """Merge the released code's two sets of draws, of n bootstrap and b flow rows, into its b rows."""
        n, b = len(t_bootstrap), len(t_flow)
        kept = slice(b - n)
        image = torch.arange(b, device=t_flow.device)
        d_flow = torch.full((b - n,), 1 / self.finest_steps, device=t_flow.device)
        n_guided = released_guided_rows(n, self.finest_steps, bias=self.rows == "released_dt_bias")
        return ShortcutDraw(
            noise=torch.cat([noise_bootstrap, noise_flow[kept]]),
            t=torch.cat([t_bootstrap, t_flow[kept]]),
            d=torch.cat([d_bootstrap, d_flow]),
            dropped=torch.cat([torch.zeros_like(dropped[:n]), dropped[kept]]),
            n_bootstrap=n,
            guided=image[:n] < n_guided,
            n_may_be_guided=self._n_may_be_guided(n),
            source=torch.cat([image[:n], image[kept]]),
        )

    @torch.no_grad()
    def targets(
        self, net: Network, data: Tensor, y: Tensor | None, draw: ShortcutDraw, *, null_y: Tensor | float | None = None
    ) -> Targets:
        """The rows of the regression, from a network that is asked for two half steps on the bootstrap rows.

        Args:
            net: gives the bootstrap targets: the average of the weights, or the weights themselves.
            data: x_1, (b, *shape).
            y: condition, (b, ...) or None.
            draw: what :meth:`draw` returned, or numbers of your own.
            null_y: the null condition, for dropped rows and guidance.

        Raises:
            ValueError: for shapes that do not fit together, times or sizes outside [0, 1], or a missing null_y.
        """
        check_batch(data, y)
        check_unit_interval(draw.d, "d")
        if draw.source is not None:
            data = data[draw.source]
            y = y[draw.source] if y is not None else None
        y = self.drop(y, draw.dropped, null_y)
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        v = velocity(draw.noise, data, self.sigma_min)
        n = draw.n_bootstrap
        if n == 0:
            return Targets(x_t, draw.t, draw.d, y, v)
        bootstrap_v, metrics = self._two_half_steps(net, x_t[:n], y[:n] if y is not None else None, draw, null_y)
        v = torch.cat([bootstrap_v.to(v.dtype), v[n:]])
        metrics["v_magnitude_flow"] = v[n:].square().mean().sqrt()
        return Targets(x_t, draw.t, draw.d, y, v, n, metrics)

    def _two_half_steps(
        self, net: Network, x_t: Tensor, y: Tensor | None, draw: ShortcutDraw, null_y: Tensor | float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The average velocity of two steps of size d/2 from x_t, and the root mean squares of its parts."""
        t, half = draw.t[: len(x_t)], draw.d[: len(x_t)] / 2

        def step_velocity(x: Tensor, t: Tensor) -> Tensor:
            return partly_guided_velocity(
                net, x, t, half, y,
                guided=draw.guided, at_most=draw.n_may_be_guided, scale=self.guidance_scale, null_y=null_y,
            )  # fmt: skip

        v1 = step_velocity(x_t, t)
        x_half_way = self._clipped(x_t + expand_to(half, x_t) * v1)
        v2 = step_velocity(x_half_way, t + half)
        v = self._clipped((v1 + v2) / 2)
        parts = {"v_magnitude_bootstrap": v, "v_magnitude_b1": v1, "v_magnitude_b2": v2}
        return v, {name: part.float().square().mean().sqrt() for name, part in parts.items()}

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def __call__(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None = None,
        *,
        target_net: Network | None = None,
        teacher: Network | None = None,
        progress: float | None = None,
        null_y: Tensor | float | None = None,
        generator: Generator | None = None,
        share: Share = WHOLE,
    ) -> LossReport:
        """The loss of net on a batch, or on a share of one.

        Args:
            net: the network to train, called as net(x_t, t, d, y).
            data: x_1, (b, *shape), float.
            y: labels (b,), any condition tensor (b, ...), or None.
            target_net: gives the bootstrap targets, usually an exponential average of net; None uses net itself.
            teacher, progress: not used.
            null_y: the condition that stands for "none": needed for condition_dropout and guidance.
            generator: where the random numbers come from, on data's device.
            share: which rows of the global batch data is; each share draws as if it were the whole.

        Raises:
            ValueError: for a batch too small for bootstrap_fraction, shapes that do not fit, or a missing null_y.
        """
        check_batch(data, y)
        draw = self.draw(whole_batch(data, share), generator=generator).of(share)
        targets = self.targets(net if target_net is None else target_net, data, y, draw, null_y=null_y)
        return regress(net, targets)
