"""The random numbers of the shortcut objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
