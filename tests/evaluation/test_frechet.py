"""The Fréchet distance against scipy's matrix square root and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from shortcutflow.evaluation.frechet import frechet_distance


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real))


@pytest.mark.parametrize("width", [1, 3, 64])
def test_equals_matrix_root(width: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, width)) @ rng.normal(size=(width, width))
    b = rng.normal(size=(400, width)) @ rng.normal(size=(width, width)) + 0.3
    if width > 1:
        assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-6)
    else:
        expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_zero_with_itself_and_shift() -> None:
    a = np.random.default_rng(0).normal(size=(300, 10))
    assert abs(frechet_distance(a, a)) < 1e-9
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 10, rel=1e-9)


def test_singular_covariances() -> None:
    """Fewer rows than columns, and pixels that never change."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(10, 64)), rng.normal(size=(12, 64))
    a[:, 5] = b[:, 5] = 1
    value = frechet_distance(a, b)
    assert np.isfinite(value)
    assert value > 0
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least two rows"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "same width"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite"),
    ],
)
def test_bad_features(a: np.ndarray, b: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        frechet_distance(a, b)
