"""The straight line from noise to data: its ends, its velocity, and how states and velocities give the ends back."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Generator, Tensor

from shortcutflow.path import expand_to, interpolate, predict_x1, velocity

SHAPES = [(6, 3, 4, 4), (6, 10, 4), (6, 5)]


def line(shape: tuple[int, ...], generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data and a time for each sample, in float64."""
    noise, data = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return noise, data, torch.linspace(0, 1, shape[0], dtype=torch.float64)


def near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ends_of_the_line(shape: tuple[int, ...], generator: Generator) -> None:
    noise, data, t = line(shape, generator)
    start, end = (interpolate(noise, data, torch.full_like(t, value)) for value in (0, 1))
    assert torch.equal(start, noise)
    assert torch.equal(end, data)
    left = interpolate(noise, data, torch.ones_like(t), sigma_min=0.1)
    assert near(left, data + 0.1 * noise)
    assert not near(left, data)


@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_velocity_is_the_derivative(shape: tuple[int, ...], sigma_min: float, generator: Generator) -> None:
    """Of a line, so the difference quotient is exact whatever the step; the wrong direction and share are not."""
    noise, data, t = line(shape, generator)
    t = t / 2
    quotient = (interpolate(noise, data, t + 0.5, sigma_min) - interpolate(noise, data, t, sigma_min)) / 0.5
    assert near(quotient, velocity(noise, data, sigma_min))
    assert not near(quotient, velocity(data, noise, sigma_min))
    assert not near(quotient, velocity(noise, data, sigma_min + 1e-5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_state_and_velocity_give_both_ends(shape: tuple[int, ...], generator: Generator) -> None:
    noise, data, t = line(shape, generator)
    x_t, v = interpolate(noise, data, t), velocity(noise, data)
    assert near(predict_x1(x_t, t, v), data)
    assert near(x_t - expand_to(t, x_t) * v, noise)
    assert not near(predict_x1(x_t, 1 - t, v), data)
    assert not near(x_t - expand_to(1 - t, x_t) * v, noise)
    assert not near(predict_x1(x_t, t, -v), data)


def test_time_of_float32_keeps_the_dtype_of_the_state() -> None:
    noise, data = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    assert interpolate(noise, data, torch.tensor([0.25, 0.5])).tolist() == [[0.25] * 3, [0.5] * 3]
    assert interpolate(noise, data, torch.tensor([0.25, 0.5])).dtype == torch.float64


@pytest.mark.parametrize(
    ("noise", "data", "t", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), "noise has shape (2, 3), data (2, 4)"),
        (torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(2), "noise has shape (1, 3), data (2, 3)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), "shape (2,), got (3,)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(0.5), "shape (2,), got ()"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, 1.25]), "got values from 0.5 to 1.25"),
        (torch.zeros(2), torch.zeros(2), torch.zeros(2), "data must be a float tensor"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.zeros(2), "torch.int64 (2, 3)"),
    ],
    ids=["shapes", "broadcast", "times", "one time", "range", "no shape", "integers"],
)
def test_states_that_do_not_fit(noise: Tensor, data: Tensor, t: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        interpolate(noise, data, t)
