"""The released code's choice of step sizes, kept apart because nothing else should copy it."""

from __future__ import annotations

import torch
from torch import Tensor, device

from shortcutflow.schedule import levels_of, size_of


def released_bootstrap_sizes(
    rows: int, finest_steps: int, *, bias: bool = False, device: device | str | None = None
) -> Tensor:
    """Step sizes of the released code's bootstrap rows, (rows,) float32, in its order.

    Each of 2/M, 4/M, ..., 1 is repeated rows // L times and the rest filled with d = 1. With ``bias`` (its
    ``bootstrap_dt_bias``) the sizes up to 1/4 share half of the rows, and a quarter each has d = 1/2 and d = 1.
    """
    levels = levels_of(finest_steps)
    row = torch.arange(rows, device=device)
    each = released_guided_rows(rows, finest_steps, bias=bias)
    level = (row // max(each, 1) + 1).clamp(max=levels)
    small = each * (levels - 2 if bias else levels)
    halves = rows // 4 if bias else 0
    level = torch.where(row < small, level, torch.where(row < small + halves, levels - 1, levels))
    return size_of(level, finest_steps)


def released_guided_rows(rows: int, finest_steps: int, *, bias: bool = False) -> int:
    """How many of the first bootstrap rows the released code guides: those it gave the finest size 2/M."""
    return (rows // 2 if bias else rows) // levels_of(finest_steps)
