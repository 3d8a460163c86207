"""Generated samples depend on (seed, i) alone; pictures show what they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shortcutflow.data.source import DataInfo
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.sample_grid import image_grid, to_uint8
from shortcutflow.seeds import generator_for
from tests.evaluation.evaluating import model_of

INFO = DataInfo((1, 4, 4), 10)


def network(x: torch.Tensor, t: torch.Tensor, d: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return torch.sin(x) + (t + d).view(-1, 1, 1, 1) + (0 if y is None else y.view(-1, 1, 1, 1))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    model, noise, labels = model_of(network, INFO), noise_of(3, 20, (1, 4, 4)), labels_of(20, 10)
    whole = generate(model, noise, labels, steps=3, batch_size=100)
    assert torch.equal(generate(model, noise, labels, steps=3, batch_size=batch_size), whole)


def test_noise_of_sample_i() -> None:
    assert torch.equal(noise_of(0, 5, (1, 4, 4)), noise_of(0, 9, (1, 4, 4))[:5])
    assert not torch.equal(noise_of(0, 5, (1, 4, 4)), noise_of(1, 5, (1, 4, 4)))
    many = noise_of(0, 500, (1, 8, 8))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02


@pytest.mark.parametrize("shape", [(3,), (1, 8, 8), (4, 5, 3)], ids=str)
def test_noise_is_that_of_a_generator_for_each_sample(shape: tuple[int, ...]) -> None:
    expected = [torch.randn(shape, generator=generator_for(7, "noise", step=i)) for i in range(20)]
    assert torch.equal(noise_of(7, 20, shape), torch.stack(expected))
    assert torch.equal(noise_of(7, range(5, 9), shape), torch.stack(expected[5:9]))


def test_labels_in_turn() -> None:
    labels, later = labels_of(12, 10), labels_of(range(9, 12), 10)
    assert labels is not None
    assert later is not None
    assert labels.tolist() == [*range(10), 0, 1]
    assert later.tolist() == [9, 0, 1]
    assert labels_of(3, None) is None


def test_samples_made_in_parts_are_those_of_the_whole() -> None:
    """Also where the sampler adds noise after each step, which depends on the sample's number."""
    noise = noise_of(3, 20, (1, 4, 4))
    model = model_of(network, INFO, sampler="consistency")
    whole = generate(model, noise, None, steps=3, seed=5)
    part = noise_of(3, range(8, 20), (1, 4, 4))
    assert torch.equal(generate(model, part, None, steps=3, seed=5, first=8), whole[8:])
    assert not torch.equal(generate(model, part, None, steps=3, seed=5), whole[8:])


def test_grid_shows_each_image_in_its_place() -> None:
    rows = [torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0, 9.0)]
    picture = image_grid(rows, ["a", "b", "c", "d"], cell=16)
    assert picture.dtype == np.uint8
    height, width, channels = picture.shape
    assert (height, channels) == (4 * 18 + 2, 3)
    for i, expected in enumerate((0, 128, 255, 255)):
        for j in range(3):
            centre = picture[2 + i * 18 + 8, width - (3 - j) * 18 + 8]
            assert centre.tolist() == [expected] * 3
    assert to_uint8(torch.zeros(2, 3, 4, 4)).shape == (2, 4, 4, 3)
