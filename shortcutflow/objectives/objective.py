"""What every objective is: it draws random numbers, makes targets from them, and regresses the network on these."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from shortcutflow.conditions import Condition, NullCondition, as_condition, check_rows, drop, require_null, select
from shortcutflow.guidance import predict_with_aux
from shortcutflow.inputs import as_state
from shortcutflow.objectives.wavelet import wavelet_error
from shortcutflow.path import check_state, expand_to, interpolate, velocity
from shortcutflow.schedule import draw_times_on_grid, levels_of
from shortcutflow.seeds import draw_noise_rows, generator_or_default
from shortcutflow.types import FULL_BATCH, BatchSlice, LossReport, Mean, Network, SamplerKind, Targets


def _power_of_two(value: int) -> int:
    levels_of(value)
    return value


PowerOfTwo = Annotated[int, AfterValidator(_power_of_two)]
FinestSteps = Annotated[PowerOfTwo, Field(description="M: the smallest step size is 1/M")]
TimeSteps = Annotated[PowerOfTwo | None, Field(description="T: the times of flow rows are multiples of 1/T")]
GuidanceScale = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="guidance of the network that makes the targets; 1 is none")
]
BandWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The velocity (r, *shape) of a step from states (r, *shape), their times (r,) and its sizes (r,)."""
ADAPTIVE_FLOOR = 0.01


@dataclass(frozen=True)
class Draw:
    """The random numbers of one evaluation, a row each: bootstrap rows first, then flow rows.

    Attributes:
        noise: x_0, (r, *shape).
        t, d: (r,) float32.
        dropped: (r,) bool, rows that lose their condition.
        n_bootstrap: how many rows are bootstrap rows.
        guided: (n_bootstrap,) bool, rows whose targets are guided; None is all of ``max_guided``.
        max_guided: guided rows lie among the first so many, which is the same in each draw.
        split: (n_bootstrap,) float32, the share of a step that the first of its target's two legs makes; None is 1/2.
        scale: (r,) float32, the guidance scale that the network is given; None for a network that is given none.
        source: (r,) int64, the sample each row uses; None means row i uses sample i.
    """

    noise: Tensor
    t: Tensor
    d: Tensor
    dropped: Tensor
    n_bootstrap: int = 0
    guided: Tensor | None = None
    max_guided: int = 0
    split: Tensor | None = None
    scale: Tensor | None = None
    source: Tensor | None = None

    def at(self, batch_slice: BatchSlice) -> Draw:
        """The rows of a slice of the batch; ``noise`` is drawn for the slice alone and stays as it is."""
        rows = batch_slice.rows
        return replace(
            self, t=self.t[rows], d=self.d[rows], dropped=self.dropped[rows],
            n_bootstrap=batch_slice.count_below(self.n_bootstrap),
            guided=self.guided[rows] if self.guided is not None else None,
            max_guided=batch_slice.count_below(self.max_guided),
            split=self.split[rows] if self.split is not None else None,
            scale=self.scale[rows] if self.scale is not None else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What an objective may use in addition to the network and the batch.

    Attributes:
        target_net: makes targets where the network itself would: usually its EMA; None is the network itself.
        teacher: the trained network that two-phase methods learn from.
        null_y: the null condition, for condition_dropout and guidance; see :mod:`shortcutflow.conditions`.
        progress: fraction of the training that is done, in [0, 1], for methods with a schedule.
        batch_slice: which rows of the global batch the data is: they get the random numbers that the whole batch would
            give them. Numbers of a few bytes a row are drawn for the whole batch, noise for the slice alone.
        noise: x_0 of each row of data, where the caller has chosen it; None draws it.
    """

    target_net: Network | None = None
    teacher: Network | None = None
    null_y: NullCondition = None
    progress: float | None = None
    batch_slice: BatchSlice = FULL_BATCH
    noise: Tensor | None = None

    def target_network(self, net: Network) -> Network:
        """The network that makes targets."""
        return net if self.target_net is None else self.target_net

    def batch_size(self, data: Tensor) -> int:
        """Rows of the global batch that ``data`` is a slice of."""
        return len(data) * self.batch_slice.count


NO_CONTEXT = Context()
HEAD = "objective_head"
"""Name of the part of a network that holds an objective's own parameters; see :func:`add_head`."""


class Objective(BaseModel, ABC):
    """A training objective: frozen, strict settings, and three steps: :meth:`draw`, :meth:`targets`, :meth:`regress`.

    It holds no network and no tensor, so the same object serves a bare callable, a compiled module, DDP and FSDP2. A
    new one writes ``draw`` and ``targets``, and ``kind``, its name in a config.

    Args:
        condition_dropout: fraction of rows trained on the null condition, which guidance needs.
        sigma_min: fraction of the noise that is left at t = 1.
        adaptive_power: p of the adaptive weight 1/(error + 0.01)^p of each row, which carries no gradient; 0 is none, 1
            makes the logarithm of the error what is minimised (MeanFlow, Geng et al. 2025).
        wavelet_weights: the error that is weighed and minimised is a weighted one by bands of frequency, from coarse to
            fine; see :func:`shortcutflow.objectives.wavelet.wavelet_error`. None is the mean squared error.
        time_weight: "ramp" multiplies each row's loss by (1 - t)^2 (0.9 t + 0.1), after all other weights: what was the
            squared error of a velocity is that of a prediction of data, with the ramp of Dreamer 4 (arXiv 2509.24527).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    condition_dropout: float = Field(default=0.0, ge=0, le=1, description="share of rows that lose their condition")
    sigma_min: float = Field(default=0.0, ge=0, lt=1, description="share of the noise that is left at t = 1")
    adaptive_power: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="p of the adaptive weight")
    wavelet_weights: tuple[BandWeight, ...] | None = Field(
        default=None, min_length=2, description="weights of bands of frequency in the error, from coarse to fine"
    )
    time_weight: Literal["ramp"] | None = Field(default=None, description="weight of a row by its time")
    _compiled: dict[str, Callable[..., Any]] = PrivateAttr(default_factory=dict)

    @abstractmethod
    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """Take every random number of one evaluation on a batch of data (b, *shape), or on a slice of a batch.

        Args:
            data: gives shape, type and device.
            generator: on data's device; None is torch's default generator, which ``torch.manual_seed`` seeds.
            context: gives progress and batch_slice.
        """

    @abstractmethod
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """The rows of the regression; deterministic, and without gradient.

        Args:
            net: the network that is trained; targets come from ``context.target_network(net)``.
            data: x_1, (b, *shape).
            y: conditions of b rows, or None.
            draw: what :meth:`draw` returned, or numbers of your own.
            context: networks and null condition.

        Raises:
            ValueError: for shapes that do not fit together, times outside [0, 1], a missing null_y or teacher.
        """

    def weigh(self, error: Tensor, targets: Targets, aux: Any) -> Tensor:
        """What is averaged to the loss, (r,): the error of each row (r,), times its weight.

        Override it for weights that depend on the error or are learned; ``aux`` is what the network returned with its
        velocity, or None.
        """
        weighted = error if targets.weight is None else targets.weight * error
        return weighted if self.adaptive_power == 0 else weighted * self.adaptive_weight(error, targets)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as this objective trains it, by default unchanged; a run builds its network through this.

        Override it for parameters of the objective's own, such as ``return add_head(network, Uncertainty())``: they
        are then optimised, averaged, sharded and saved with the network's.
        """
        return network

    @property
    def needs_teacher(self) -> bool:
        """Whether it is the second phase of two: needs a trained network, whose weights it starts from."""
        return False

    @property
    def step_conditioned(self) -> bool:
        """Whether a sampler may give its network step sizes above 1/M; False for one that knows the flow alone."""
        return True

    @property
    def sampler(self) -> SamplerKind:
        """The sampler that such a network is made for."""
        return "euler"

    def target_evaluations(self, batch_size: int) -> float:
        """Forward evaluations that the targets of such a batch need, divided by its samples."""
        return 0.0

    @property
    def targets_in_graph(self) -> bool:
        """Whether :meth:`compiled` compiles the targets too; False where a graph cannot hold them, or would be long."""
        return True

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether batches of one size call the networks with the same numbers of rows throughout the training."""
        return True

    def compiled(self, *, regress: bool = True, **options: Any) -> Self:
        """The objective, with :meth:`targets` and :meth:`regress` compiled together with the networks that they call.

        Calls of the network, compiled or not, become a part of the two graphs, so that the small operations around them
        are fused with it. Random numbers are drawn as before, outside of the graphs.

        Args:
            regress: False leaves the regression as it is: for a network in DistributedDataParallel, which is compiled
                inside of it.
            options: of ``torch.compile``, such as ``dynamic=False`` for batches of one size.
        """
        copy, chosen = self.model_copy(), {"targets": self.targets_in_graph, "regress": regress}
        copy._compiled = {name: torch.compile(getattr(self, name), **options) for name in chosen if chosen[name]}
        return copy

    def teacher_stage(self, progress: float) -> int:
        """Whenever this number grows, the teacher becomes a copy of the network that makes targets."""
        return 0

    def __call__(
        self,
        net: Network,
        data: Tensor,
        y: Any = None,
        *,
        target_net: Network | None = None,
        teacher: Network | None = None,
        progress: float | None = None,
        null_y: NullCondition = None,
        generator: Generator | None = None,
        batch_slice: BatchSlice = FULL_BATCH,
        noise: Tensor | None = None,
    ) -> LossReport:
        """The loss of net on a batch, or on a slice of one.

        Args:
            net: the network to train, called as net(x_t, t, d, y).
            data: x_1, (b, *shape), float; converted to the precision of a float32 network.
            y: labels (b,) as a tensor, array or list of whole numbers, or any condition; see
                :mod:`shortcutflow.conditions`.
            generator: where the random numbers come from, on data's device; None is torch's default generator.
            target_net, teacher, progress, null_y, batch_slice, noise: see :class:`Context`.

        Raises:
            ValueError: for a missing teacher, progress or null_y, shapes that do not fit together, or noise for an
                objective that draws its own.
        """
        data, y = as_batch(net, data, y)
        context = Context(target_net, teacher, null_y, progress, batch_slice, noise)
        with torch.no_grad():
            draw = self.draw(data, generator, context)
            targets = self._compiled.get("targets", self.targets)(net, data, y, draw, context)
        report: LossReport = self._compiled.get("regress", self.regress)(net, targets)
        return report

    def regress(self, net: Network, targets: Targets) -> LossReport:
        """Mean over rows of the weighted mean squared error of s(x_t, t, d, y) against v (the paper's eq. 5).

        Raises:
            ValueError: if the network's output has another shape than x_t, if the weights are not (r,), or if
                wavelet_weights do not fit the shape of a row.
        """
        check_state(targets.x_t, targets.t)
        prediction, aux = predict_with_aux(net, targets.x_t, targets.t, targets.d, targets.y)
        prediction = prediction.to(targets.v.dtype)
        error = F.mse_loss(prediction, targets.v, reduction="none").flatten(1).mean(1)
        row_loss, n = error.detach(), targets.n_bootstrap
        if self.wavelet_weights is not None:
            error = wavelet_error(prediction - targets.v, self.wavelet_weights)
        weighted = self.weigh(error, targets, aux)
        if weighted.shape != error.shape:
            raise ValueError(f"weights must be one number a row, {tuple(error.shape)}, got {tuple(weighted.shape)}")
        if self.time_weight is not None:
            weighted = weighted * (1 - targets.t) ** 2 * (0.9 * targets.t + 0.1)
        parts = {"loss": weighted.detach(), "loss_flow": row_loss[n:], "loss_bootstrap": row_loss[:n]}
        means = {name: Mean(rows.sum(), len(rows)) for name, rows in parts.items()} | targets.metrics
        return LossReport(loss=weighted.mean(), means=means, row_loss=row_loss, targets=targets)

    # What draws and targets of several objectives share.

    def draw_dropped(self, rows: int, generator: Generator, device: torch.device) -> Tensor:
        """Which rows lose their condition, (rows,) bool."""
        return torch.rand(rows, generator=generator, device=device) < self.condition_dropout

    def draw_steps(self, data: Tensor, d: float, generator: Generator | None, context: Context) -> Draw:
        """Noise, times that are multiples of one step size, and dropped conditions."""
        b, device, generator = context.batch_size(data), data.device, generator_or_default(generator, data.device)
        noise = noise_like(data, generator, context)
        t = draw_times_on_grid(b, d, generator=generator, device=device)
        return Draw(noise, t, torch.full_like(t, d), self.draw_dropped(b, generator, device)).at(context.batch_slice)

    def adaptive_weight(self, error: Tensor, targets: Targets) -> Tensor:
        """1/(error + 0.01)^p of each row (r,), without gradient."""
        return (error.detach() + ADAPTIVE_FLOOR) ** -self.adaptive_power

    def drop(self, y: Condition, dropped: Tensor, null_y: NullCondition) -> Condition:
        """Replace the dropped rows of y by the null condition; a condition_dropout of 0 needs none.

        Raises:
            ValueError: if rows may be dropped and y or null_y is missing.
        """
        if y is None:
            if self.condition_dropout:
                raise ValueError(
                    f"condition_dropout is {self.condition_dropout:g}, but there is no condition y to drop: "
                    "pass y, or set condition_dropout to 0"
                )
            return None
        if self.condition_dropout == 0 and null_y is None:
            return y
        return drop(y, dropped, require_null(null_y))

    def row_inputs(
        self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context
    ) -> tuple[Tensor, Condition]:
        """x_1 and the condition of each row of a draw: its sample's, dropped where the draw says so."""
        data, y = as_batch(net, data, y)
        if draw.source is not None:
            data, y = data[draw.source], select(y, draw.source)
        return data, self.drop(y, draw.dropped, context.null_y)

    def path_rows(
        self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context
    ) -> tuple[Tensor, Tensor, Condition]:
        """x_t, v and the condition of each row of a draw."""
        data, y = self.row_inputs(net, data, y, draw, context)
        return interpolate(draw.noise, data, draw.t, self.sigma_min), velocity(draw.noise, data, self.sigma_min), y


def add_head(network: nn.Module, head: nn.Module) -> nn.Module:
    """Let a network return ``(v, head(x_t, t, d, y))``; the head becomes a part of it, named ``objective_head``.

    The network stays the module it was, with the names of its parameters, so that it compiles, shards and loads as
    before; where it is loaded to sample from, the head is left out.
    """
    network.add_module(HEAD, head)
    network.register_forward_hook(_with_aux)
    return network


def _with_aux(network: nn.Module, inputs: tuple[Any, ...], v: Tensor) -> tuple[Tensor, Any]:
    return v, network.get_submodule(HEAD)(*inputs)


def as_batch(net: Network, data: Tensor, y: Any) -> tuple[Tensor, Condition]:
    """Data and conditions as the network takes them.

    Raises:
        ValueError: unless data is (b, *shape) floats and y, if any, has b rows too.
    """
    if not isinstance(data, Tensor):
        raise ValueError(f"data must be a float tensor (batch, *shape), got {type(data).__name__}: use torch.as_tensor")
    if data.ndim < 2 or not data.is_floating_point():
        raise ValueError(f"data must be a float tensor (batch, *shape), got {data.dtype} {tuple(data.shape)}")
    y = as_condition(y, data.device)
    check_rows(y, len(data))
    return as_state(net, data), y


def noise_like(data: Tensor, generator: Generator, context: Context) -> Tensor:
    """x_0 for data, a slice of a batch: the context's noise, or drawn by :func:`shortcutflow.seeds.draw_noise_rows`.

    Raises:
        ValueError: if the context has noise of another shape than data.
    """
    if context.noise is None:
        here = context.batch_slice
        return draw_noise_rows(len(data), data.shape[1:], generator, here, dtype=data.dtype, device=data.device)
    if context.noise.shape != data.shape:
        raise ValueError(f"noise must have the shape of data, {tuple(data.shape)}, got {tuple(context.noise.shape)}")
    return context.noise.to(data)


def require_no_noise(context: Context, rows: str) -> None:
    """Raise ValueError if noise is given for rows that are not one for each sample, or not made of the samples."""
    if context.noise is not None:
        raise ValueError(f"{rows} need noise of their own: pass no noise=, and in a run use coupling=null")


def two_legs(
    first: Step,
    second: Step,
    x_t: Tensor,
    t: Tensor,
    d: Tensor,
    split: float | Tensor = 0.5,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The velocities v1, v2 of two legs that make up a step, and its own, split v1 + (1 - split) v2.

    The first leg covers [t, s], the second [s, t + d], with s = t + split d. Two equal legs are eq. 4.

    Args:
        first, second: the velocity (r, *shape) of a leg from states (r, *shape), their times (r,) and its size (r,).
        x_t, t, d: states (r, *shape), their times and the sizes of the steps, (r,).
        split: share of the step that the first leg makes, one or (r,).
        clip: bound on the state between the legs.
    """
    d1 = split * d
    v1 = first(x_t, t, d1)
    x_s = clipped(torch.addcmul(x_t, expand_to(d1, x_t), v1), clip).to(x_t.dtype)
    v2 = second(x_s, t + d1, d - d1)
    share = expand_to(split, v1) if isinstance(split, Tensor) else split
    if isinstance(share, Tensor):
        return v1, v2, share * v1 + (1 - share) * v2
    return v1, v2, torch.add(share * v1, v2, alpha=1 - share)


def clipped(x: Tensor, bound: float | None) -> Tensor:
    """x within +-bound; None is no bound."""
    return x if bound is None else x.clamp(-bound, bound)


def count_of(fraction: float, batch_size: int, kind: str) -> int:
    """How many of batch_size rows are of a kind that gets this fraction of them.

    Raises:
        ValueError: if there should be some and the batch is too small to hold one.
    """
    n = int(batch_size * fraction + 1e-6)
    if n == 0 and fraction > 0:
        smallest = math.ceil((1 - 1e-6) / fraction)
        raise ValueError(
            f"a batch of {batch_size} holds no {kind} row at {kind}_fraction {fraction:g}: "
            f"use at least {smallest} samples, a fraction of at least 1/{batch_size}, or 0 for none"
        )
    return n


def require_sliced_evenly(n: int, batch_slice: BatchSlice, rows: str, *, exactly: bool) -> None:
    """Raise ValueError if slices of a batch would have none of its n special rows, or unequal numbers of them."""
    count = batch_slice.count
    if exactly and n % count:
        raise ValueError(
            f"the released rows need {rows} rows that {count} slices divide, there are {n}: a slice is a process's "
            "batch, or one part of it in gradient accumulation"
        )
    if 0 < n < count:
        raise ValueError(
            f"{n} {rows} rows cannot be shared by {count} slices (processes times accumulation): use larger batches"
        )


def require_teacher(teacher: Network | None, kind: str) -> Network:
    """Return the teacher, or raise ValueError."""
    if teacher is None:
        raise ValueError(f"{kind} learns from a trained network: pass it as teacher=")
    return teacher


def require_progress(progress: float | None, kind: str) -> float:
    """Return progress, or raise ValueError unless it is in [0, 1]."""
    if progress is None or not 0 <= progress <= 1:
        raise ValueError(
            f"{kind} follows a schedule: pass progress=step/total_steps, a number from 0 to 1, got {progress!r}"
        )
    return progress


def stage_of(progress: float | None, stages: int, kind: str) -> int:
    """floor(progress * stages): how many equal parts of the training are over, from 0 to stages.

    Raises:
        ValueError: without a progress in [0, 1].
    """
    # step/total may round down just below the stage that begins there.
    return int(require_progress(progress, kind) * stages + 1e-9)


def guided_evaluations(scale: float) -> int:
    """Forward evaluations that a guided velocity costs."""
    return 1 if scale in (0, 1) else 2


def rms_metrics(**velocities: Tensor) -> dict[str, Mean]:
    """Root mean squares over all entries of velocities (r, *shape), as metrics v_magnitude_*; r may be 0."""
    # All norms in one launch where there are launches.
    norms = torch.stack(torch._foreach_norm([v.float() for v in velocities.values()]))
    totals = dict(zip(velocities, norms.square().unbind(), strict=True))
    return {f"v_magnitude_{name}": Mean(totals[name], v.numel(), root=True) for name, v in velocities.items()}
