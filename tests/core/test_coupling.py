"""Optimal transport between noise and data: the cheapest permutation, within classes, and nothing else."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Generator, Tensor

from shortcutflow import coupling
from shortcutflow.coupling import TransportCoupling, couple


def batch(n: int, classes: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    noise, data = torch.randn(2, n, 2, 3, generator=generator)
    return noise, data / 2 + 1, torch.randint(classes, (n,), generator=generator)


def cost(noise: Tensor, data: Tensor) -> float:
    return float((noise - data).square().sum())


def in_order(rows: Tensor) -> list[list[float]]:
    return sorted(rows.flatten(1).tolist())


def test_no_permutation_is_cheaper(generator: Generator) -> None:
    noise, data, _ = batch(7, 1, generator)
    best = min(cost(noise[list(order)], data) for order in itertools.permutations(range(7)))
    assert cost(couple(noise, data), data) == pytest.approx(best)
    assert cost(noise, data) > 1.05 * best, "the control: pairs as they were drawn"


def test_as_scipy_assigns_squared_distances(generator: Generator) -> None:
    from scipy.optimize import linear_sum_assignment

    noise, data, _ = batch(300, 1, generator)
    _, column = linear_sum_assignment(torch.cdist(data.flatten(1), noise.flatten(1)).square().numpy())
    assert torch.equal(couple(noise, data), noise[torch.from_numpy(column)])
    shuffled = noise[torch.randperm(300, generator=generator)]
    assert cost(shuffled, data) > 1.2 * cost(couple(noise, data), data), "the control: a random permutation"


def test_noise_stays_in_its_class(generator: Generator) -> None:
    noise, data, y = batch(200, 5, generator)
    coupled = couple(noise, data, y)
    for label in range(5):
        mine = y == label
        assert in_order(coupled[mine]) == in_order(noise[mine])
        assert torch.equal(coupled[mine], couple(noise[mine], data[mine]))
    assert cost(couple(noise, data), data) < cost(coupled, data) < cost(noise, data)


@pytest.mark.parametrize("y", [None, torch.arange(120).view(60, 2), torch.arange(60.0), {"label": torch.arange(60)}])
def test_what_is_no_label_is_one_class(y: object, generator: Generator) -> None:
    noise, data, _ = batch(60, 1, generator)
    assert torch.equal(couple(noise, data, y), couple(noise, data))
    assert in_order(couple(noise, data, y)) == in_order(noise)


def test_classes_may_be_mixed_by_the_setting(generator: Generator) -> None:
    noise, data, y = batch(60, 3, generator)
    assert torch.equal(TransportCoupling().couple(noise, data, y), couple(noise, data, y))
    assert torch.equal(TransportCoupling(per_class=False).couple(noise, data, y), couple(noise, data))


def test_large_classes_are_assigned_in_equal_parts(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, data, _ = batch(90, 1, generator)
    whole = couple(noise, data)
    monkeypatch.setattr(coupling, "EXACT_ROWS", 40)
    parts = couple(noise, data)
    assert torch.equal(parts, torch.cat([couple(noise[i : i + 30], data[i : i + 30]) for i in (0, 30, 60)]))
    assert cost(whole, data) < cost(parts, data) < cost(noise, data)
    assert in_order(parts) == in_order(noise)


def test_a_sample_that_comes_twice_is_no_tie_of_rounding(generator: Generator) -> None:
    """Whatever the order in which the products are summed: here that of the axes."""
    noise, data = torch.randn(2, 40, 50, generator=generator)
    data = data.repeat(2, 1)
    noise = torch.cat([noise, torch.randn(40, 50, generator=generator)])
    axes = torch.randperm(50, generator=generator)
    assert torch.equal(couple(noise, data)[:, axes], couple(noise[:, axes], data[:, axes]))


def test_samples_that_are_not_finite_are_left_to_the_step(generator: Generator) -> None:
    noise, data, y = batch(20, 2, generator)
    data[3], data[4, 0, 0] = float("nan"), float("-inf")
    assert in_order(couple(noise, data, y)) == in_order(noise)


def test_other_shapes_and_a_missing_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"shape of data, \(3, 2\), got \(2, 2\)"):
        couple(torch.zeros(2, 2), torch.zeros(3, 2))
    assert couple(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0, 2)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"couplings need scipy: pip install 'shortcutflow\[train\]'"):
        couple(torch.zeros(2, 2), torch.zeros(2, 2))
