"""Generated samples depend on (seed, i) alone; pictures show what they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.grids import sample_grid, to_uint8


def network(x: torch.Tensor, t: torch.Tensor, d: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return torch.sin(x) + (t + d).view(-1, 1, 1, 1) + (0 if y is None else y.view(-1, 1, 1, 1))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    noise, labels = noise_of(3, 20, (1, 4, 4)), labels_of(20, 10)
    whole = generate(network, noise, labels, steps=3, batch_size=100)
    assert torch.equal(generate(network, noise, labels, steps=3, batch_size=batch_size), whole)


def test_noise_of_sample_i() -> None:
    assert torch.equal(noise_of(0, 5, (1, 4, 4)), noise_of(0, 9, (1, 4, 4))[:5])
    assert not torch.equal(noise_of(0, 5, (1, 4, 4)), noise_of(1, 5, (1, 4, 4)))
    many = noise_of(0, 500, (1, 8, 8))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02


def test_labels_in_turn() -> None:
    labels = labels_of(12, 10)
    assert labels is not None
    assert labels.tolist() == [*range(10), 0, 1]
    assert labels_of(3, None) is None


def test_grid_shows_each_image_in_its_place() -> None:
    rows = [torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0, 9.0)]
    picture = sample_grid(rows, ["a", "b", "c", "d"], cell=16)
    assert picture.dtype == np.uint8
    height, width, channels = picture.shape
    assert (height, channels) == (4 * 18 + 2, 3)
    for i, expected in enumerate((0, 128, 255, 255)):
        for j in range(3):
            centre = picture[2 + i * 18 + 8, width - (3 - j) * 18 + 8]
            assert centre.tolist() == [expected] * 3
    assert to_uint8(torch.zeros(2, 3, 4, 4)).shape == (2, 4, 4, 3)
