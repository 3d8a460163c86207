"""Later methods of the shortcut family: any step [t, r] has a target of two legs, [t, s] and [s, r].

    u(x_t, t, r)  <-  lam u1 + (1 - lam) u2,     s = t + lam (r - t),     x_s = x_t + (s - t) u1

u is the average velocity, here the network s(x_t, t, d) with d = r - t; u1 and u2 are the velocities of the legs. The
methods differ in lam and in what makes the first leg:

=====================  ==========================================  ================================
objective              first leg                                   share lam of it
=====================  ==========================================  ================================
SplitMeanFlow          the network                                 uniform, or 1/2
alpha-Flow             x_1 - x_0                                   1 -> 0, a sigmoid of the progress
SoFlow                 x_1 - x_0                                   0.1 -> 0.002, exponentially
MeanFlow               x_1 - x_0                                   the limit 0, a derivative
Lagrangian             the network                                 the limit 1, a derivative
=====================  ==========================================  ================================

A shortcut model (:mod:`shortcutflow.objectives.shortcut`) has lam = 1/2, both legs by the network, and t and d on the
dyadic grid. The rows that have no such target have d = 0 and follow the flow, s(x_t, t, 0) <- x_1 - x_0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shortcutflow.conditions import Condition, select
from shortcutflow.guidance import predict
from shortcutflow.objectives.objective import (
    NO_CONTEXT,
    Context,
    Draw,
    FinestSteps,
    Step,
    count_of,
    require_progress,
    require_sliced_evenly,
    rms_metrics,
    two_legs,
)
from shortcutflow.objectives.plug_in import FlowObjective
from shortcutflow.path import check_unit_interval, expand_to
from shortcutflow.schedule import TimeDensity, draw_times
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import Network, Targets

Split = float | Tensor
DIFFERENCE = 0.005
"""Half the distance in t of a central difference, as in TiM (arXiv 2509.04394)."""


class TwoLegObjective(FlowObjective):
    """Base: bootstrap rows with t < r, two uniform numbers in order, and flow rows with d = 0.

    Every sample makes exactly one row: the first ``floor(bootstrap_fraction * b)`` are bootstrap rows. A new method
    writes :meth:`bootstrap`, the target of a step, and :meth:`draw_split` if its legs are not equal.

    Args:
        finest_steps: M of the network, a power of two: steps at or below 1/M are the flow to it.
        bootstrap_fraction: fraction of the batch that are bootstrap rows.
        time_density: of the times of flow rows; None is uniform.
        condition_dropout: fraction of rows, of both kinds, trained on the null condition.
        sigma_min: fraction of the noise left at t = 1.
        adaptive_power: p of the adaptive weight, see :class:`Objective`.
        plug_in_groups: see :class:`shortcutflow.objectives.plug_in.FlowObjective`.
    """

    finest_steps: FinestSteps = 128
    bootstrap_fraction: float = Field(default=0.25, ge=0, le=1, description="share of self-consistency rows")
    time_density: TimeDensity = None

    @abstractmethod
    def bootstrap(self, s: Step, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, split: Split) -> tuple[Tensor, ...]:
        """The velocities that the targets of n bootstrap rows are made of, and last the targets, all (n, *shape).

        Args:
            s: the network that makes targets.
            x_t, t, d: the rows.
            v: x_1 - x_0 of each, or its mean.
            split: the share of the step that the first leg makes, one or (n,).
        """

    def draw_split(
        self, rows: int, progress: float | None, generator: Generator, device: torch.device
    ) -> Tensor | None:
        """The share lam of a step that its first leg makes, (rows,); None is 1/2."""
        return None

    def n_bootstrap(self, batch_size: int) -> int:
        """How many of batch_size rows are bootstrap rows.

        Raises:
            ValueError: if there should be some and the batch is too small to hold one.
        """
        return count_of(self.bootstrap_fraction, batch_size, "bootstrap")

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Noise, times, step sizes, shares of legs and dropped conditions for a batch of data (b, *shape).

        Raises:
            ValueError: for a schedule without progress, the fraction of the training that is done; if a slice would
                have no bootstrap row while another has.
        """
        b, device = context.batch_size(data), data.device
        n = self.n_bootstrap(b)
        require_sliced_evenly(n, context.batch_slice, "bootstrap", exactly=False)
        generator = generator_or_default(generator, device)
        noise = self.draw_noise(data, generator, context)
        times = draw_times(b, density=self.time_density, first_uniform=n, generator=generator, device=device)
        ends = draw_times(n, generator=generator, device=device)
        t = torch.cat([torch.minimum(times[:n], ends), times[n:]])
        d = torch.cat([(times[:n] - ends).abs(), torch.zeros_like(times[n:])])
        split = self.draw_split(n, context.progress, generator, device)
        dropped = self.draw_dropped(b, generator, device)
        return Draw(noise, t, d, dropped, n, split=split).at(context.batch_slice)

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """Flow rows, and bootstrap rows by the target network."""
        check_unit_interval(draw.d, "d")
        x_t, v, y = self.path_rows(net, data, y, draw, context)
        n = draw.n_bootstrap
        if n == 0:
            return Targets(x_t, draw.t, draw.d, y, v)
        target_net, y_bootstrap = context.target_network(net), select(y, slice(n))

        def s(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
            return predict(target_net, x, t, d, y_bootstrap)

        split = 0.5 if draw.split is None else draw.split
        *parts, target = self.bootstrap(s, x_t[:n], draw.t[:n], draw.d[:n], v[:n], split)
        metrics = rms_metrics(bootstrap=target, flow=v[n:], **{f"b{i}": part for i, part in enumerate(parts, 1)})
        v = torch.cat([target.to(v.dtype), v[n:]])
        return Targets(x_t, draw.t, draw.d, y, v, n, metrics, weight=self.weights(draw))

    def weights(self, draw: Draw) -> Tensor | None:
        """Of each row in the loss, (r,); None is 1."""
        return None


class SplitMeanFlowObjective(TwoLegObjective):
    """SplitMeanFlow (Guo et al. 2025, arXiv 2507.16884): both legs by the network.

    Equal legs are a shortcut model in continuous time, which Boffi, Albergo and Vanden-Eijnden (2025, arXiv 2505.18825)
    call progressive self-distillation (PSD).

    >>> objective = SplitMeanFlowObjective(split="middle")
    >>> report = objective(net, data, labels, target_net=ema_net, generator=g)

    Args:
        split: where a step is split: "uniform", or in the "middle".
        others: see :class:`TwoLegObjective`.
    """

    kind: Literal["split_mean_flow"] = "split_mean_flow"
    split: Literal["uniform", "middle"] = "uniform"

    def target_evaluations(self, batch_size: int) -> float:
        """Both legs of each bootstrap row."""
        return 2 * self.n_bootstrap(batch_size) / batch_size

    def draw_split(
        self, rows: int, progress: float | None, generator: Generator, device: torch.device
    ) -> Tensor | None:
        """Uniform numbers, or None for the middle."""
        return None if self.split == "middle" else torch.rand(rows, generator=generator, device=device)

    def bootstrap(self, s: Step, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, split: Split) -> tuple[Tensor, ...]:
        """Both legs, and their mean."""
        return two_legs(s, s, x_t, t, d, split)


class DataLegObjective(TwoLegObjective):
    """Base of the two whose first leg is x_1 - x_0 over a share lam of the step that falls during the training.

    Bootstrap rows have the loss error/lam, whose gradient has a limit for lam -> 0, that of MeanFlow; the adaptive
    weight is 1/(error/lam^2 + 0.01)^p, of an error that does not vanish with lam either.
    """

    @abstractmethod
    def share_at(self, progress: float | None) -> float:
        """lam, in (0, 1], when so much of the training is done."""

    def target_evaluations(self, batch_size: int) -> float:
        """The second leg of each bootstrap row."""
        return self.n_bootstrap(batch_size) / batch_size

    def draw_split(self, rows: int, progress: float | None, generator: Generator, device: torch.device) -> Tensor:
        """One number for all rows."""
        return torch.full((rows,), self.share_at(progress), device=device)

    def bootstrap(self, s: Step, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, split: Split) -> tuple[Tensor, ...]:
        """Both legs, and their mean."""
        return two_legs(lambda *_: v, s, x_t, t, d, split)

    def weights(self, draw: Draw) -> Tensor | None:
        """1/lam of bootstrap rows."""
        return None if draw.split is None else torch.cat([1 / draw.split, torch.ones_like(draw.d[draw.n_bootstrap :])])

    def adaptive_weight(self, error: Tensor, targets: Targets) -> Tensor:
        """1/(error/lam^2 + 0.01)^p of each row (r,), without gradient."""
        return super().adaptive_weight(error if targets.weight is None else error * targets.weight**2, targets)


class AlphaFlowObjective(DataLegObjective):
    """alpha-Flow (Zhang et al. 2025, arXiv 2510.20771): from flow matching on all steps (lam = 1) to MeanFlow.

    lam is the paper's alpha, a falling sigmoid of the progress, 1 where that is above 0.995, and never below 0.005, as
    the authors train without derivatives. Their adaptive weight lam/(error + c) has a constant c, under which rows lose
    their weight as lam falls; here c is 0.01 lam^2.

    Args:
        alpha: a fixed lam; None follows the schedule.
        others: see :class:`TwoLegObjective`.
    """

    kind: Literal["alpha_flow"] = "alpha_flow"
    alpha: float | None = Field(default=None, gt=0, le=1, description="share of the first leg; None: from 1 to 0.005")
    bootstrap_fraction: float = Field(default=0.75, ge=0, le=1, description="share of self-consistency rows")
    adaptive_power: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="p of the adaptive weight")

    def share_at(self, progress: float | None) -> float:
        """alpha."""
        if self.alpha is not None:
            return self.alpha
        alpha = 1 / (1 + math.exp(25 * (require_progress(progress, self.kind) - 0.5)))
        return 1.0 if alpha > 0.995 else max(alpha, 0.005)


class SoFlowObjective(DataLegObjective):
    """SoFlow (Luo, Yuan, Liu 2025, arXiv 2512.15657): a first leg of 0.1 to 0.002 of the step.

    The paper's loss is of states x_r with weight 1/((s - t)(r - t)): the error/lam of velocities.

    Args:
        first_share, last_share: lam at the beginning and at the end of the training; it falls exponentially.
        others: see :class:`TwoLegObjective`.
    """

    kind: Literal["soflow"] = "soflow"
    first_share: float = Field(default=0.1, gt=0, le=1, description="share of the first leg when training begins")
    last_share: float = Field(default=0.002, gt=0, le=1, description="share of the first leg when training ends")
    adaptive_power: float = Field(default=0.5, ge=0, allow_inf_nan=False, description="p of the adaptive weight")

    def share_at(self, progress: float | None) -> float:
        """first_share^(1 - progress) last_share^progress."""
        done = require_progress(progress, self.kind)
        return self.first_share ** (1 - done) * self.last_share**done


class DerivativeObjective(TwoLegObjective):
    """Base of the two in which one leg is infinitely short, so that the target has a derivative of the network.

    Args:
        derivative: "difference" of two evaluations, which any network allows, with an error of second order in their
            distance; or "jvp", exact, by forward-mode differentiation with the plain attention kernel, which neither
            DistributedDataParallel nor fused operators without such a derivative allow.
        others: see :class:`TwoLegObjective`.
    """

    derivative: Literal["difference", "jvp"] = "difference"

    @property
    def targets_in_graph(self) -> bool:
        """Not with forward-mode derivatives, which the compiler does not know."""
        return self.derivative == "difference"

    def derive(
        self, s: Step, at: tuple[Tensor, ...], along: tuple[Tensor, ...], ahead: Tensor, back: Tensor
    ) -> tuple[Tensor, Tensor]:
        """s and its derivative in one direction, both (n, *shape).

        Args:
            s: a network.
            at: x_t, t, d.
            along: the direction, the change of each of the three.
            ahead, back: (n,) how far the direction can be followed, both ways, without leaving t and d in [0, 1].

        Raises:
            RuntimeError: if the network has no forward-mode derivative.
        """
        if self.derivative == "jvp":
            return jvp(s, at, along)
        ahead, back = ahead.clamp(0, DIFFERENCE), back.clamp(0, DIFFERENCE)
        after, before = (
            s(*(start + expand_to(step, start) * change for start, change in zip(at, along, strict=True)))
            for step in (ahead, -back)
        )
        width = (ahead + back).clamp(min=torch.finfo(ahead.dtype).tiny)
        slope = (after - before) / expand_to(width, after)
        return before + expand_to(back, before) * slope, slope


class MeanFlowObjective(DerivativeObjective):
    """MeanFlow (Geng et al. 2025, arXiv 2505.13447): the first leg, of velocity x_1 - x_0, is infinitely short.

        s(x_t, t, d)  <-  v + d (v . grad_x + d/dt - d/dd) s

    Args:
        derivative: see :class:`DerivativeObjective`.
        others: see :class:`TwoLegObjective`.
    """

    kind: Literal["mean_flow"] = "mean_flow"
    adaptive_power: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="p of the adaptive weight")

    def target_evaluations(self, batch_size: int) -> float:
        """Two evaluations on each bootstrap row; a Jacobian-vector product costs about as much."""
        return 2 * self.n_bootstrap(batch_size) / batch_size

    def bootstrap(self, s: Step, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, split: Split) -> tuple[Tensor, ...]:
        """The derivative along the flow, and the target."""
        one = torch.ones_like(t)
        _, slope = self.derive(s, (x_t, t, d), (v, one, -one), ahead=d, back=t)
        return slope, v + expand_to(d, v) * slope


class LagrangianObjective(DerivativeObjective):
    """Lagrangian self-distillation (LSD; Boffi, Albergo, Vanden-Eijnden 2025): the second leg is infinitely short.

    The end x_r = x_t + d s(x_t, t, d) moves, when r does, with the network's own velocity there:

        s(x_t, t, d)  <-  s(x_r, r, 0) - d (d/dd) s(x_t, t, d)

    The paper has the derivative in the prediction, with gradient; here it is in the target, without, as in MeanFlow.

    Args:
        derivative: see :class:`DerivativeObjective`.
        others: see :class:`TwoLegObjective`.
    """

    kind: Literal["lagrangian"] = "lagrangian"

    def target_evaluations(self, batch_size: int) -> float:
        """Two evaluations for the derivative and one at the end, on each bootstrap row."""
        return 3 * self.n_bootstrap(batch_size) / batch_size

    def bootstrap(self, s: Step, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, split: Split) -> tuple[Tensor, ...]:
        """The velocity at the end, the derivative, and the target."""
        still = torch.zeros_like(t)
        along = (torch.zeros_like(x_t), still, torch.ones_like(d))
        u, slope = self.derive(s, (x_t, t, d), along, ahead=1 - t - d, back=d)
        at_end = s((x_t + expand_to(d, u) * u).to(x_t.dtype), t + d, still)
        return at_end, slope, at_end - expand_to(d, slope) * slope


def jvp(s: Step, at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """s and its exact derivative in one direction.

    Raises:
        RuntimeError: if the network has no forward-mode derivative.
    """
    try:
        # The other attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            result: Any = torch.func.jvp(s, at, along)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "derivative='jvp' does not go through this network (DistributedDataParallel, compiled networks and some "
            "fused operators have no forward-mode derivative): use derivative='difference', or a target_net that is "
            "not wrapped"
        ) from error
    value, slope = result
    return value, slope
