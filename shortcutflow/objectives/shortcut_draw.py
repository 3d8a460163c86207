"""The random numbers of the shortcut objective, and which of them belong to a share of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shortcutflow.types import Share


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
