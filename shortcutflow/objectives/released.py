"""The released code's choice of step sizes, kept apart because nothing else should copy it."""

from __future__ import annotations

import torch
from torch import Tensor

from shortcutflow.schedule import levels_of


def released_bootstrap_sizes(rows: int, finest_steps: int, *, bias: bool = False) -> Tensor:
    """Step sizes of the released code's bootstrap rows, (rows,) float32, in its order.

    Each of 2/M, 4/M, ..., 1 is repeated rows // L times and the rest filled with d = 1. With ``bias`` (its
    ``bootstrap_dt_bias``) the sizes up to 1/4 share half of the rows, and a quarter each has d = 1/2 and d = 1.
    """
    levels = levels_of(finest_steps)
    exponents = torch.arange(levels - 1, -1, -1)
    if bias:
        quarter = torch.ones(rows // 4, dtype=torch.int64)
        many = exponents[:-2].repeat_interleave((rows // 2) // levels)
        exponents = torch.cat([many, quarter, torch.zeros_like(quarter)])
    else:
        exponents = exponents.repeat_interleave(rows // levels)
    exponents = torch.cat([exponents, exponents.new_zeros(rows - len(exponents))])
    return torch.exp2(-exponents.float())


def released_guided_rows(rows: int, finest_steps: int, *, bias: bool = False) -> int:
    """How many of the first bootstrap rows the released code guides: those it gave the finest size 2/M."""
    return (rows // 2 if bias else rows) // levels_of(finest_steps)
