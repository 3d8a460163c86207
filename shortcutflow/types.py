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
y       ``y``            condition: labels (b,) int64, a tensor (b, ...), a mapping of such, or None
M       finest_steps     the finest budget; d at or below 1/M means "follow the flow"
s       the network      average velocity over [t, t + d], in the direction data minus noise
======  ===============  ==========================================================================

``shape`` is (channels, height, width) for images, (length, channels) for sequences, and may have any number of axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from shortcutflow.conditions import Condition


class Network(Protocol):
    """Anything that predicts the average velocity s(x_t, t, d, y), of the shape of x_t.

    It may return ``(velocity, aux)``: samplers use the velocity, and an objective may use what comes with it, such as
    an uncertainty for each row.
    """

    def __call__(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any, /) -> Any: ...


SamplerKind = Literal["euler", "consistency", "live_reflow"]
"""How a trained network is sampled from; see :func:`shortcutflow.sampling.sample`."""


@dataclass(frozen=True)
class BatchSlice:
    """Which rows of a global batch are here: ``index``, ``index + count``, ``index + 2 count``, ...

    Attributes:
        index: of this slice: a rank, or one of the parts (gradient accumulation) in which a rank takes its batch.
        count: how many slices there are; they are equally large.
    """

    index: int = 0
    count: int = 1

    @property
    def rows(self) -> slice:
        """Picks this slice's rows out of all."""
        return slice(self.index, None, self.count)

    def count_below(self, n: int) -> int:
        """How many of this slice's rows are among the first n of the global batch."""
        return len(range(self.index, n, self.count))


FULL_BATCH = BatchSlice()


@dataclass(frozen=True)
class Batch:
    """Samples as a data source hands them out.

    Attributes:
        data: (b, *shape) float32.
        y: labels (b,) int64, or any condition (see :mod:`shortcutflow.conditions`).
        keys: the name of each sample in its shard, for messages that name a broken one.
        noise: x_0 of each sample, (b, *shape), where a coupling has chosen it; None: the objective draws it.
    """

    data: Tensor
    y: Condition
    keys: tuple[str, ...] = ()
    noise: Tensor | None = None


class Mean(NamedTuple):
    """A mean that is kept as its sum and its number of rows, so that means of unequal parts of a batch add up exactly.

    Attributes:
        total: sum over the rows, 0-d, without gradient; 0 where there is no row.
        rows: how many; for a mean over single numbers, such as a root mean square, how many of these.
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
        metrics: of the targets themselves. The names depend on the global batch alone, never on a slice's rows: the
            processes of a run add them up together.
        weight: (r,) of each row in the loss; None is 1.
    """

    x_t: Tensor
    t: Tensor
    d: Tensor
    y: Condition
    v: Tensor
    n_bootstrap: int = 0
    metrics: dict[str, Mean] = field(default_factory=dict)
    source: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class LossReport:
    """What an objective returns for a batch.

    Attributes:
        loss: 0-d tensor to call ``backward`` on.
        means: by name; the same names in every slice of a global batch, also where a slice has no row of a kind.
        row_loss: (r,) mean squared error of each row, without weight and gradient.
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
