"""States at several times, and below each where the network says that it comes to at t = 1."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch import Tensor

from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.drawing.grids import sample_grid


class Ends(NamedTuple):
    """What is drawn: c times and n samples.

    Attributes:
        t: the c times.
        x_t: (c, n, *shape), the states.
        by_flow: (c, n, *shape), x_1 by one evaluation of the flow; None if the network knows no flow.
        by_steps: (c, n, *shape), x_1 by the steps that the network was trained for; None if it knows none.
    """

    t: list[float]
    x_t: Tensor
    by_flow: Tensor | None
    by_steps: Tensor | None

    def decoded(self, decoder: ImageDecoder) -> Ends:
        """The same as images."""
        return self.with_groups(decoder(*self.groups()))

    def groups(self) -> list[Tensor]:
        """The tensors that are not None, in order."""
        return [x for x in (self.x_t, self.by_flow, self.by_steps) if x is not None]

    def with_groups(self, groups: Sequence[Tensor]) -> Ends:
        """The same with other tensors in the places of :meth:`groups`."""
        x_t, *rest = groups
        by_flow = rest.pop(0) if self.by_flow is not None else None
        return Ends(self.t, x_t, by_flow, rest.pop(0) if self.by_steps is not None else None)


def draw_ends(ends: Ends, *, names: Sequence[str], title: str, columns: Sequence[str] | None = None) -> np.ndarray:
    """A picture (height, width, 3) uint8: for each sample a row of states and one or two rows of their ends.

    Args:
        ends: what is drawn, as images.
        names: one a sample, before its first row.
        title: above all.
        columns: what stands above the columns beside the time.
    """
    kinds = {"x_t": ends.x_t, "flow": ends.by_flow, "steps": ends.by_steps}
    shown = {kind: values for kind, values in kinds.items() if values is not None}
    rows, labels = [], []
    for i, name in enumerate(names):
        for kind, values in shown.items():
            rows.append(values[:, i])
            labels.append(f"{name}  {kind}".strip() if kind == "x_t" else kind)
    heads = [f"t = {as_fraction(t)}" for t in ends.t]
    if columns is not None:
        heads = [f"{head}\n{below}" for head, below in zip(heads, columns, strict=True)]
    return sample_grid(rows, labels, cell=64, columns=heads, group=len(shown), title=title)


def names_of(y: Tensor | None, n: int) -> list[str]:
    """What samples are called in a picture: by label if they have one."""
    return [""] * n if y is None else [f"label {label}" for label in y.tolist()]


def as_fraction(value: float) -> str:
    """A time or step size as people write it: 0.125 is 1/8."""
    return str(Fraction(value).limit_denominator(4096))
