"""The words of this library as types.

Legend (one meaning each, everywhere; b = samples, r = rows of a regression):

======  ===============  ==========================================================================
symbol  in code          meaning
======  ===============  ==========================================================================
x_0     ``noise``        standard normal noise, the state at t = 0; (b, \\*shape)
x_1     ``data``         data, the state at t = 1; (b, \\*shape)
x_t     ``x_t``          (1 - t) x_0 + t x_1; (b, \\*shape)
t       ``t``            time, 0 = noise, 1 = data; (b,) float32 in [0, 1]
d       ``d``            step size: s moves x_t to x_{t+d} = x_t + d s; (b,) float32 in [0, 1]
y       ``y``            condition: labels (b,) int64, any tensor (b, ...), or None
M       finest_steps     the finest budget; d at or below 1/M means "follow the flow"
s       the network      average velocity over [t, t + d], in the direction data minus noise
======  ===============  ==========================================================================

``shape`` is (channels, height, width) for images and (length, channels) for sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Generator, Tensor


class Network(Protocol):
    """Anything that predicts the average velocity s(x_t, t, d, y), of the shape of x_t."""

    def __call__(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor: ...


SamplerKind = Literal["euler", "consistency", "live_reflow"]
"""How a trained network is sampled from; see :func:`shortcutflow.sampling.sample`."""


class Share(NamedTuple):
    """Which rows of a global batch are here: ``number``, ``number + total``, ``number + 2 total``, ...

    Attributes:
        number: of this share: of a process, or of one of the parts in which a process takes its batch.
        total: how many shares there are; they are equally large.
    """

    number: int = 0
    total: int = 1

    @property
    def rows(self) -> slice:
        """Picks this share's rows out of all."""
        return slice(self.number, None, self.total)

    def rows_among_first(self, n: int) -> int:
        """How many of this share's rows are among the first n of all."""
        return len(range(self.number, n, self.total))


WHOLE = Share()


@dataclass(frozen=True)
class Batch:
    """Samples as a data source hands them out.

    Attributes:
        data: (b, *shape) float32.
        y: labels (b,) int64, any condition tensor (b, ...), or None.
        keys: the name of each sample in its shard, for messages that name a broken one.
    """

    data: Tensor
    y: Tensor | None
    keys: tuple[str, ...] = ()


class Mean(NamedTuple):
    """A mean that is kept as its sum and its number of rows, so that means of unequal parts of a batch add up exactly.

    Attributes:
        total: sum over the rows, 0-d, without gradient; 0 where there is no row.
        rows: how many.
        root: the metric is the square root of the mean.
    """

    total: Tensor
    rows: int = 1
    root: bool = False

    @property
    def value(self) -> Tensor:
        """The mean, or its root."""
        mean = self.total / self.rows
        return mean.sqrt() if self.root else mean


@dataclass(frozen=True)
class Targets:
    """The rows a network is regressed on: s(x_t, t, d, y) should be v.

    Attributes:
        x_t: (r, *shape).
        t, d: (r,) float32.
        y: condition of each row, dropped ones already replaced, or None.
        v: (r, *shape) the target velocity; carries no gradient.
        n_bootstrap: the first so many rows are self-consistency rows, the rest flow rows.
        source: (r,) int64, the sample each row is made from; None means row i is made from sample i.
        metrics: of the targets themselves. The names depend on the global batch alone, never on a share's rows: the
            processes of a run add them up together.
    """

    x_t: Tensor
    t: Tensor
    d: Tensor
    y: Tensor | None
    v: Tensor
    n_bootstrap: int = 0
    metrics: dict[str, Mean] = field(default_factory=dict)
    source: Tensor | None = None


@dataclass(frozen=True)
class LossReport:
    """What one evaluation of an objective gives.

    Attributes:
        loss: 0-d tensor to call ``backward`` on.
        means: by name; the same names in every share of a global batch, also where a share has no row of a kind.
        row_loss: (r,) mean squared error of each row, without gradient.
        targets: the rows it was computed on.
    """

    loss: Tensor
    means: dict[str, Mean]
    row_loss: Tensor
    targets: Targets

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Those that have rows here, as 0-d tensors (reading one with ``float`` waits for the device)."""
        return {name: mean.value for name, mean in self.means.items() if mean.rows}


class Objective(Protocol):
    """A training objective: draws random numbers, makes targets, regresses the network on them.

    It holds no network and no tensor, so the same object serves a bare callable, a compiled module, DDP and FSDP2.
    """

    @property
    def tells_step_size(self) -> bool:
        """Whether the network it trains may be told step sizes above 1/M when it is sampled."""

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> Any:
        """Take every random number of one evaluation on a share of a batch: those that the whole batch would get."""

    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: Any,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """Make the rows of the regression; deterministic, without gradient. ``net`` gives the bootstrap targets."""

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
        """draw, targets, regression.

        ``teacher`` is the trained network of two-phase methods, ``progress`` the share of the training that is done, in
        [0, 1], for methods with a schedule; other methods ignore them.

        ``share`` says which rows of a global batch data is; the random numbers are then those that the global batch
        would have got in one piece, from the same generator in every process.
        """
