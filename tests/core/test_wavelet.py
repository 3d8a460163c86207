"""The error by bands of frequency, against the transform written out as matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import shortcutflow as sf
from shortcutflow.objectives.wavelet import wavelet_error
from tests.core.networks import Learner, zero


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=Generator().manual_seed(0))


def haar(size: int) -> Tensor:
    """One level of the orthonormal transform of a line, (size, size): means, then differences, both times sqrt(2)."""
    pairs = torch.eye(size // 2, dtype=torch.float64)
    return torch.cat([torch.kron(pairs, torch.tensor([[1.0, sign]])) for sign in (1.0, -1.0)]) / 2**0.5


def coefficients(x: Tensor, levels: int) -> list[Tensor]:
    """Of the bands of x (..., h, w), from coarse to fine, each (..., n)."""
    bands: list[Tensor] = []
    for _ in range(levels):
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = haar(2 * h) @ x @ haar(2 * w).T
        details = [x[..., :h, w:], x[..., h:, :w], x[..., h:, w:]]
        bands.insert(0, torch.cat([part.flatten(-2) for part in details], dim=-1))
        x = x[..., :h, :w]
    return [x.flatten(-2), *bands]


@pytest.mark.parametrize(
    ("shape", "levels"), [((3, 8, 8), 3), ((2, 8, 12), 2), ((16, 4), 2), ((2, 3, 4, 4), 1)], ids=str
)
def test_bands_are_those_of_the_orthonormal_transform(shape: tuple[int, ...], levels: int) -> None:
    x = noise(5, *shape)
    of_bands = torch.stack([band.square().view(5, -1).sum(1) for band in coefficients(x, levels)])
    torch.testing.assert_close(
        of_bands.sum(0), x.square().flatten(1).sum(1), msg="Parseval: the matrices are orthogonal"
    )
    for i, expected in enumerate(of_bands / x[0].numel()):
        one = [float(i == j) for j in range(levels + 1)]
        torch.testing.assert_close(wavelet_error(x, one), expected)
    weights = [0.3, 2.0, 1.0, 5.0][: levels + 1]
    found = wavelet_error(x, weights)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=x.dtype) @ of_bands / x[0].numel())
    assert not torch.allclose(found, wavelet_error(x, weights[::-1])), "coarse comes first"


def loss_and_gradient(weights: tuple[float, ...] | None) -> tuple[sf.LossReport, Tensor]:
    net = Learner().double()
    report = sf.ShortcutObjective(finest_steps=8, bootstrap_weight=3, adaptive_power=0.5, wavelet_weights=weights)(
        net, noise(16, 1, 8, 8), generator=Generator().manual_seed(1)
    )
    return report, torch.autograd.grad(report.loss, net.weight)[0]


def test_equal_weights_are_the_mean_squared_error() -> None:
    plain, plain_gradient = loss_and_gradient(None)
    equal, equal_gradient = loss_and_gradient((1, 1, 1, 1))
    torch.testing.assert_close(equal.loss, plain.loss)
    torch.testing.assert_close(equal_gradient, plain_gradient)
    uneven, uneven_gradient = loss_and_gradient((1, 1, 1, 2))
    assert abs(uneven.loss - plain.loss) > 0.01 * plain.loss
    assert not torch.allclose(uneven_gradient, plain_gradient, rtol=0.01)
    # Errors that are reported can be compared between settings.
    assert torch.equal(uneven.row_loss, plain.row_loss)
    assert torch.equal(uneven.metrics["loss_bootstrap"], plain.metrics["loss_bootstrap"])


def test_a_band_without_weight_is_not_seen() -> None:
    down, right = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    checkerboard = (1.0 - 2 * ((down + right) % 2)).expand(4, 1, 8, 8)
    rows = sf.Targets(torch.zeros(4, 1, 8, 8), torch.zeros(4), torch.zeros(4), None, checkerboard)
    blind, seeing = (sf.FlowMatchingObjective(wavelet_weights=(1, 1, weight)).regress(zero, rows) for weight in (0, 1))
    assert blind.loss == 0
    torch.testing.assert_close(seeing.loss, torch.tensor(1.0))
    assert torch.equal(blind.row_loss, torch.ones(4))


@pytest.mark.parametrize("shape", [(1, 8, 6), (1, 6, 8), (8,)], ids=str)
def test_sizes_that_cannot_be_halved_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"3 bands make 2 levels, .* last two axes 4 divides; these have shape \("):
        sf.FlowMatchingObjective(wavelet_weights=(1, 1, 1))(zero, torch.zeros(4, *shape))


@pytest.mark.parametrize("weights", [(), (1,), (1, -1), (1, float("inf"))], ids=str)
def test_weights_that_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="wavelet_weights"):
        sf.FlowMatchingObjective(wavelet_weights=weights)
