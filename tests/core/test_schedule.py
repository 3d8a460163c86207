"""Step sizes and times: what training draws covers the dyadic grid, and what sampling walks stays on it.

Shown: all sizes come equally often even with one row a batch; times are multiples of their step; schedules of any
budget add up to 1 and ask only for trained steps. The checks reject the obvious wrong choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from shortcutflow.objectives.released import released_bootstrap_sizes
from shortcutflow.schedule import draw_bootstrap_sizes, draw_times_on_grid, levels_of, step_sizes

DrawSizes = Callable[[int, int, Generator], Tensor]


def systematic(rows: int, finest_steps: int, generator: Generator) -> Tensor:
    return draw_bootstrap_sizes(rows, finest_steps, generator=generator)


def independent(rows: int, finest_steps: int, generator: Generator) -> Tensor:
    """A wrong choice for small batches: every row draws its size by itself."""
    k = torch.randint(levels_of(finest_steps), (rows,), generator=generator)
    return (2.0 ** (k + 1) / finest_steps).sort().values


def remainder_at_one(rows: int, finest_steps: int, generator: Generator) -> Tensor:
    """The released code's choice: as many of each size as fit, the others at d = 1."""
    return released_bootstrap_sizes(rows, finest_steps).sort().values


def counts_of(d: Tensor, finest_steps: int) -> Tensor:
    """How often each size 2/M, 4/M, ..., 1 occurs; every size must be one of these."""
    grid = torch.tensor([2.0 ** (k + 1) / finest_steps for k in range(levels_of(finest_steps))])
    counts = (d[:, None] == grid).sum(0)
    assert int(counts.sum()) == len(d), "a size off the grid"
    return counts


# ---- step sizes of training


@pytest.mark.parametrize("finest_steps", [2, 4, 128, 1024])
@pytest.mark.parametrize("rows", [1, 3, 7, 10, 64, 100])
def test_sizes_lie_on_the_grid_finest_first(rows: int, finest_steps: int, generator: Generator) -> None:
    for _ in range(50):
        d = systematic(rows, finest_steps, generator)
        assert d.dtype == torch.float32
        counts = counts_of(d, finest_steps)
        assert torch.equal(d, d.sort().values)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("wrong", [independent, remainder_at_one])
def test_other_choices_are_uneven_within_a_batch(wrong: DrawSizes, generator: Generator) -> None:
    counts = torch.stack([counts_of(wrong(20, 128, generator), 128) for _ in range(50)])
    assert (counts.max(1).values - counts.min(1).values).max() > 1


def test_a_size_off_the_grid_is_told_apart() -> None:
    with pytest.raises(AssertionError, match="off the grid"):
        counts_of(torch.tensor([1 / 128, 1.0]), 128)  # 1/M is the flow's, never a bootstrap row's


def chi_square(draw: DrawSizes, rows: int, batches: int, generator: Generator) -> float:
    """Pearson's statistic of the sizes of many batches against equal shares, 6 degrees of freedom."""
    counts = sum(counts_of(draw(rows, 128, generator), 128) for _ in range(batches))
    assert isinstance(counts, Tensor)
    expected = rows * batches / 7
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("rows", [1, 2, 5, 10])
def test_every_size_comes_equally_often(rows: int, generator: Generator) -> None:
    # 22.5 is exceeded once in a thousand by independent rows, more rarely by these, whose counts vary less.
    assert chi_square(systematic, rows, 2000, generator) < 22.5
    assert chi_square(remainder_at_one, rows, 2000, generator) > 1000


def test_one_row_a_batch_reaches_the_finest_size(generator: Generator) -> None:
    d = torch.cat([systematic(1, 128, generator) for _ in range(200)])
    assert set(d.tolist()) == {2.0**-k for k in range(7)}


def test_the_generator_decides_the_sizes() -> None:
    same, again, other = (systematic(5, 128, Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


# ---- times of training


def off_the_grid(t: Tensor, d: Tensor) -> Tensor:
    """Rows whose time is no multiple of d, or from which a step of d leaves [0, 1]."""
    multiple = t.double() / d.double()
    return (multiple != multiple.round()) | (t < 0) | (t.double() + d.double() > 1)


def test_times_are_multiples_of_their_step_below_one(generator: Generator) -> None:
    d = 2.0 ** -torch.randint(0, 11, (100_000,), generator=generator)
    t = draw_times_on_grid(len(d), d, generator=generator)
    assert t.dtype == torch.float32
    assert not off_the_grid(t, d).any()
    assert off_the_grid(t + 0.5 * d, d).all()
    assert off_the_grid(t + d, d).any()


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_times_are_uniform_on_their_grid(n: int, generator: Generator) -> None:
    def deviation(t: Tensor) -> float:
        """The largest deviation of a time's frequency from 1/n, in standard errors."""
        counts = torch.bincount((t * n).round().long(), minlength=n)
        return float(((counts - len(t) / n).abs() / (len(t) / n) ** 0.5).max())

    t = draw_times_on_grid(128_000, 1 / n, generator=generator)
    assert deviation(t) < 4.5
    if n > 1:  # one time alone is uniform whatever one does
        rounded = (torch.rand(128_000, generator=generator) * n).round() / n
        assert deviation(rounded) > 4.5


# ---- schedules of sampling


def misaligned(sizes: Sequence[float], finest_steps: int) -> list[tuple[float, float]]:
    """(t, d) of the steps that training never asks for: d off the grid, or t no multiple of it."""
    grid = {2.0**-k for k in range(levels_of(finest_steps) + 1)}
    starts = [math.fsum(sizes[:i]) for i in range(len(sizes))]
    return [(t, d) for t, d in zip(starts, sizes, strict=True) if d not in grid or t % d != 0]


@pytest.mark.parametrize("finest_steps", [2, 64, 128, 256])
def test_schedules_add_up_to_one(finest_steps: int) -> None:
    for steps in range(1, 301):
        sizes = step_sizes(steps, finest_steps)
        assert len(sizes) == steps
        assert all(d > 0 for d in sizes)
        assert math.fsum(sizes) == pytest.approx(1, abs=1e-14)


def test_schedules_up_to_the_finest_walk_the_grid() -> None:
    for steps in range(1, 129):
        sizes = step_sizes(steps)
        assert misaligned(sizes, 128) == [], steps
        assert math.fsum(sizes) == 1
        assert max(sizes) <= 2 * min(sizes), "only neighbouring sizes are mixed"


def test_wrong_schedules_leave_the_grid() -> None:
    assert misaligned([1 / 3] * 3, 128)
    assert misaligned([0.25, 0.5, 0.25], 128) == [(0.25, 0.5)]
    assert misaligned([1 / 256] * 256, 128)


def test_powers_of_two_and_finer_budgets_are_uniform() -> None:
    uniform = {steps for steps in range(1, 301) if set(step_sizes(steps)) == {1 / steps}}
    assert uniform == {1, 2, 4, 8, 16, 32, 64} | set(range(128, 301))


def unevenness(sizes: Sequence[float]) -> float:
    """How far the number of steps up to any border of the coarse steps is from its share of all, at most."""
    coarse = 1 << (len(sizes).bit_length() - 1)
    ends = [math.fsum(sizes[: i + 1]) for i in range(len(sizes))]
    borders = [i / coarse for i in range(1, coarse + 1)]
    return max(abs(sum(end <= border for end in ends) - border * len(sizes)) for border in borders)


def test_halved_steps_are_evenly_spread() -> None:
    assert step_sizes(3) == [1 / 2, 1 / 4, 1 / 4]
    assert step_sizes(6) == [1 / 4, 1 / 8, 1 / 8, 1 / 4, 1 / 8, 1 / 8]
    assert all(unevenness(step_sizes(steps)) < 1 for steps in range(1, 128))
    assert unevenness([1 / 8] * 4 + [1 / 4] * 2) >= 1, "all fine steps first"


def test_explicit_sizes_are_taken_as_they_are() -> None:
    assert step_sizes([0.5, 0.2, 0.3]) == [0.5, 0.2, 0.3]
    assert step_sizes((1,)) == [1.0]


@pytest.mark.parametrize("steps", [0, -1, -128])
def test_too_few_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        step_sizes(steps)


@pytest.mark.parametrize("steps", [True, False, 4.0, 1.0, None, {1.0}, torch.tensor([0.5, 0.5])], ids=str)
def test_steps_of_another_type(steps: Any) -> None:
    with pytest.raises(ValueError, match="whole number or a sequence"):
        step_sizes(steps)


@pytest.mark.parametrize("steps", ["1", "4", "abc", "", b"\x01"], ids=repr)
def test_text_is_no_schedule(steps: Any) -> None:
    """A string is a sequence too, of characters; it must not be read as step sizes."""
    with pytest.raises(ValueError, match=r"steps must|a schedule needs"):
        step_sizes(steps)


@pytest.mark.parametrize(
    "steps",
    [[], [0.5], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0], [0.5, 0.5 + 1e-5], [float("nan")], [float("inf")]],
    ids=str,
)
def test_sequences_that_are_no_schedule(steps: list[float]) -> None:
    with pytest.raises(ValueError, match="positive step sizes that add up to 1, got") as raised:
        step_sizes(steps)
    assert str(steps) in str(raised.value)


@pytest.mark.parametrize("finest_steps", [-4, 0, 1, 3, 100, 127])
def test_finest_steps_must_be_a_power_of_two(finest_steps: int, generator: Generator) -> None:
    calls: list[Callable[[], object]] = [
        lambda: levels_of(finest_steps),
        lambda: step_sizes(1, finest_steps),
        lambda: draw_bootstrap_sizes(4, finest_steps, generator=generator),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"power of two, at least 2, got {finest_steps}"):
            call()


def test_levels_count_the_doublings() -> None:
    assert [levels_of(m) for m in (2, 4, 8, 128, 1024)] == [1, 2, 3, 7, 10]
