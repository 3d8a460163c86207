"""The released code's rows, number for number, kept apart because nothing else should copy them.

Its order of rows, its reuse of the first images, its remainder rows at d = 1, its undropped labels on bootstrap rows.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, device

from shortcutflow.objectives.objective import (
    NO_CONTEXT,
    Context,
    Draw,
    noise_like,
    require_no_noise,
    require_sliced_evenly,
)
from shortcutflow.schedule import draw_times_on_grid, levels_of, size_of
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import FULL_BATCH, BatchSlice


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


def draw_shortcut_rows(
    data: Tensor,
    n: int,
    generator: Generator | None = None,
    context: Context = NO_CONTEXT,
    *,
    finest_steps: int,
    condition_dropout: float,
    bias: bool = False,
    force_t: float | None = None,
    force_d: float | None = None,
) -> Draw:
    """The random numbers of the released shortcut objective.

    Args:
        data: a slice of a batch (b, *shape).
        n: bootstrap rows of the whole batch.
        generator, context: as for :meth:`Objective.draw`.
        finest_steps, condition_dropout, bias: its settings.
        force_t: use this time in all rows instead of drawn ones.
        force_d: use this step size in all bootstrap rows.
    """
    b, device, here = context.batch_size(data), data.device, context.batch_slice
    require_no_noise(context, "the released rows")
    require_sliced_evenly(n, here, "bootstrap", exactly=True)
    generator = generator_or_default(generator, device)
    noise_bootstrap = noise_like(data[: n // here.count], generator, context)
    d = released_bootstrap_sizes(n, finest_steps, bias=bias, device=device)
    if force_d is not None:
        d = torch.full_like(d, force_d)
    t_bootstrap = draw_times_on_grid(n, d, generator=generator, device=device)
    noise_flow = noise_like(data, generator, context)
    t_flow = draw_times_on_grid(b, 1 / finest_steps, generator=generator, device=device)
    if force_t is not None:
        t_bootstrap, t_flow = torch.full_like(t_bootstrap, force_t), torch.full_like(t_flow, force_t)
    dropped = torch.rand(b, generator=generator, device=device) < condition_dropout
    return shortcut_rows(
        t_bootstrap[here.rows], d[here.rows], noise_bootstrap, t_flow[here.rows], noise_flow, dropped[here.rows],
        finest_steps=finest_steps, bias=bias, batch_slice=here,
    )  # fmt: skip


def shortcut_rows(
    t_bootstrap: Tensor,
    d_bootstrap: Tensor,
    noise_bootstrap: Tensor,
    t_flow: Tensor,
    noise_flow: Tensor,
    dropped: Tensor,
    *,
    finest_steps: int,
    bias: bool = False,
    batch_slice: BatchSlice = FULL_BATCH,
) -> Draw:
    """Merge the released code's two sets of draws, of n bootstrap and b flow rows, into its b rows.

    Of a slice of a batch all are the slice's rows: since slices divide n, they merge among themselves.
    """
    n, b = len(t_bootstrap), len(t_flow)
    kept = slice(b - n)
    image = torch.arange(b, device=t_flow.device)
    guided = batch_slice.count_below(released_guided_rows(n * batch_slice.count, finest_steps, bias=bias))
    return Draw(
        noise=torch.cat([noise_bootstrap, noise_flow[kept]]),
        t=torch.cat([t_bootstrap, t_flow[kept]]),
        d=torch.cat([d_bootstrap, torch.full_like(t_flow[kept], 1 / finest_steps)]),
        dropped=torch.cat([torch.zeros_like(dropped[:n]), dropped[kept]]),
        n_bootstrap=n,
        max_guided=guided,
        source=torch.cat([image[:n], image[kept]]),
    )


def live_reflow_rows(t_reflow: Tensor, t_flow: Tensor, noise: Tensor, dropped: Tensor, finest_steps: int) -> Draw:
    """Merge the released code's draws for n reflow and b flow rows of live reflow into its b rows."""
    n, b = len(t_reflow), len(t_flow)
    kept = slice(b - n)
    image = torch.arange(b, device=t_flow.device)
    source = torch.cat([image[:n], image[kept]])
    return Draw(
        noise=noise[source],
        t=torch.cat([t_reflow, t_flow[kept]]),
        d=torch.cat([torch.ones_like(t_reflow), torch.full_like(t_flow[kept], 1 / finest_steps)]),
        dropped=torch.cat([torch.zeros_like(dropped[:n]), dropped[kept]]),
        n_bootstrap=n,
        source=source,
    )
