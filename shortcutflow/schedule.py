"""Step sizes and times: what training draws and what sampling walks.

Everything lives on the dyadic grid of the paper: with at most M = 2^L steps the step sizes are
d in {1/M, 2/M, ..., 1/2, 1}, and a step of size d starts at a multiple of d. Sampling with 2^k steps then calls the
network only with what it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor, device

DEFAULT_STEPS = (1, 2, 4, 128)
"""Numbers of sampling steps that are shown and measured unless others are given."""


def levels_of(finest_steps: int) -> int:
    """L = log2(M), the number of doublings from the finest step to one step.

    Raises:
        ValueError: if finest_steps is not a power of two, at least 2.
    """
    if not isinstance(finest_steps, int) or finest_steps < 2 or finest_steps & (finest_steps - 1):
        raise ValueError(f"finest_steps must be a power of two, at least 2, got {finest_steps!r}")
    return finest_steps.bit_length() - 1


def draw_bootstrap_sizes(
    rows: int, finest_steps: int, *, generator: Generator | None = None, device: device | str | None = None
) -> Tensor:
    """Step sizes for the self-consistency rows, (rows,) float32, finest first.

    Systematic sampling over the L sizes 2/M, 4/M, ..., 1: one shared random offset, then equal spacing. Every
    size gets rows/L rows in expectation and never more than one row off it, so small batches cover all sizes over
    a few steps and large ones in every step. (The released code gives left-over rows to d = 1, and all rows if
    there are fewer than L.)
    """
    levels = levels_of(finest_steps)
    offset = torch.rand((), generator=generator, device=device)
    position = (torch.arange(rows, device=device) + offset) * (levels / rows)
    # position < levels holds in exact arithmetic; float32 can round the last one up.
    return size_of(position.long().clamp(max=levels - 1) + 1, finest_steps)


def size_of(level: Tensor, finest_steps: int) -> Tensor:
    """The step size 2^level / M, float32; exact on every device, which exp2 need not be."""
    return (1 << level).float() / finest_steps


class LogitNormal(BaseModel):
    """Times whose logit is normal (Esser et al. 2024, arXiv 2403.03206, section 3.1): most of them near one time.

    Args:
        mean: of log(t/(1 - t)); 0 puts most times near 1/2, more puts them nearer to the data (t = 1).
        std: of the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = Field(default=0.0, allow_inf_nan=False)
    std: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def quantile(self, u: Tensor) -> Tensor:
        """The times that uniform numbers u in [0, 1) stand for, in [0, 1)."""
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return t.clamp(max=1 - 2**-24)


TimeDensity = Annotated[LogitNormal | None, Field(description="density of the times of flow rows; None is uniform")]


def draw_times(
    rows: int,
    *,
    density: LogitNormal | None = None,
    first_uniform: int = 0,
    generator: Generator | None = None,
    device: device | str | None = None,
) -> Tensor:
    """Times in [0, 1), (rows,) float32, from a density; uniform without one, and in the first so many rows."""
    t = torch.rand(rows, generator=generator, device=device)
    return t if density is None else torch.cat([t[:first_uniform], density.quantile(t[first_uniform:])])


def to_grid(t: Tensor, d: Tensor | float) -> Tensor:
    """Times in [0, 1) rounded down to the multiples {0, d, 2d, ..., 1 - d}; d a power of two, one or (rows,)."""
    return torch.floor(t / d) * d


def draw_times_on_grid(
    rows: int, d: Tensor | float, *, generator: Generator | None = None, device: device | str | None = None
) -> Tensor:
    """Times t uniform on the multiples {0, d, 2d, ..., 1 - d}, (rows,) float32; d a power of two, one or (rows,)."""
    return to_grid(draw_times(rows, generator=generator, device=device), d)


def step_sizes(steps: int | Sequence[float], finest_steps: int = 128) -> list[float]:
    """The steps a sampler takes from t = 0 to t = 1.

    * a power of two up to M: equal steps, as in training;
    * any other number below M: steps of two neighbouring dyadic sizes, each starting at a multiple of itself, so
      that the network still makes only steps it was trained on: of the 2^k coarse steps so many are halved
      as are missing, evenly spread (3 steps: 1/2, 1/4, 1/4);
    * more than M: equal steps, finer than any step of training (the flow is followed);
    * a sequence: the step sizes themselves.

    Args:
        steps: a number of steps, or positive step sizes that add up to 1.
        finest_steps: M, the most steps of training.

    Raises:
        ValueError: if steps is below 1, or a sequence does not add up to 1 or holds a step that is not positive.
    """
    if isinstance(steps, bool | str | bytes) or not isinstance(steps, int | Sequence):
        raise ValueError(f"steps must be a whole number or a sequence of step sizes, got {steps!r}")
    if not isinstance(steps, int):
        if not all(isinstance(d, int | float) and not isinstance(d, bool) for d in steps):
            raise ValueError(f"step sizes must be numbers, got {list(steps)!r}")
        sizes = [float(d) for d in steps]
        if not sizes or not all(d > 0 for d in sizes) or not math.isclose(math.fsum(sizes), 1, abs_tol=1e-6):
            raise ValueError(f"a schedule needs positive step sizes that add up to 1, got {list(steps)!r}")
        return sizes
    levels_of(finest_steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if steps > finest_steps:
        return [1 / steps] * steps
    coarse = 1 << (steps.bit_length() - 1)
    halved = steps - coarse
    sizes = []
    for i in range(coarse):
        if (i + 1) * halved // coarse > i * halved // coarse:
            sizes += [0.5 / coarse, 0.5 / coarse]
        else:
            sizes.append(1 / coarse)
    return sizes
