"""The Fréchet distance against scipy's matrix square root, clean-fid and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from shortcutflow.evaluation.distances.frechet import frechet_between, frechet_distance
from shortcutflow.evaluation.distances.statistics import Moments, Statistics


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real))


def by_rows(a: np.ndarray, b: np.ndarray) -> float:
    """Exact for any rank, and no covariance is formed: the root's trace is the nuclear norm of the rows' products."""
    difference = a.mean(0) - b.mean(0)
    rows_a, rows_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    roots = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()
    return float(difference @ difference + (rows_a**2).sum() + (rows_b**2).sum() - 2 * roots)


def statistics(x: np.ndarray) -> Statistics:
    moments = Moments()
    moments.add(x)
    return moments.statistics()


def correlated(seed: int, rows: int, width: int) -> np.ndarray:
    """Features with a spectrum that falls over four decades, as Inception's does."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) * np.logspace(0, -2, width)) @ rng.normal(size=(width, width)) + 0.3 * seed


@pytest.mark.parametrize("width", [2, 3, 64, 300])
def test_equals_matrix_root(width: int) -> None:
    a, b = correlated(0, 1500, width), correlated(1, 1400, width)
    expected = by_matrix_root(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_between(statistics(a), statistics(b)) == frechet_distance(a, b)
    # Negative control: the bound would see a covariance divided by n instead of n - 1.
    biased = Statistics(a.mean(0), np.cov(a, rowvar=False, bias=True))
    assert frechet_between(biased, statistics(b)) != pytest.approx(expected, rel=1e-6)


def test_equals_clean_fid() -> None:
    from cleanfid import fid

    a, b = correlated(0, 900, 64), correlated(1, 800, 64)
    assert frechet_distance(a, b) == pytest.approx(fid.fid_from_feats(a, b), rel=1e-6)
    assert frechet_between(statistics(a), statistics(b)) == pytest.approx(
        fid.frechet_distance(*statistics(a), *statistics(b)), rel=1e-6
    )


def test_closed_forms() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 1)), 2 * rng.normal(size=(400, 1)) + 0.3
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    x = rng.normal(size=(300, 10))
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 10, rel=1e-9)
    assert frechet_distance(x, x.mean(0) + 3 * (x - x.mean(0))) == pytest.approx(4 * x.var(0, ddof=1).sum(), rel=1e-9)


SINGULAR = {
    "fewer rows than columns": lambda a, b: (a[:40], b[:50]),
    "fewer rows in one only": lambda a, b: (a[:40], b),
    "two rows": lambda a, b: (a[:2], b[:2]),
    "constant columns": lambda a, b: (np.where(np.arange(96) % 3 == 0, 1.0, a), np.where(np.arange(96) < 9, 1.0, b)),
    "repeated columns": lambda a, b: (np.tile(a[:, :48], 2), b),
    "repeated rows": lambda a, b: (np.tile(a[:20], (9, 1)), np.tile(b[:30], (7, 1))),
    "one point": lambda a, b: (np.tile(a[:1], (9, 1)), b),
    "two points": lambda a, b: (np.tile(a[:1], (9, 1)), np.tile(b[:1], (9, 1))),
    "far from zero": lambda a, b: (a[:40] + 1e3, b[:50] + 1e3),
}


@pytest.mark.parametrize("change", SINGULAR.values(), ids=SINGULAR)
def test_singular_covariances(change) -> None:
    a, b = change(correlated(0, 300, 96), correlated(1, 300, 96))
    expected = by_rows(a, b)
    assert expected > 1
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-11)


def test_roots_of_rounded_eigenvalues_would_not_do() -> None:
    """What the factors are for: fewer rows than columns, and a distance much smaller than the traces."""
    a = np.random.default_rng(0).normal(size=(40, 400))
    b = a * (1 + 1e-4)
    expected, shape = by_rows(a, b), (a.mean(0), np.cov(a, rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    values, vectors = np.linalg.eigh(shape[1])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root).clip(min=0)
    difference = a.mean(0) - b.mean(0)
    rounded = difference @ difference + values.sum() * (1 + (1 + 1e-4) ** 2) - 2 * np.sqrt(cross).sum()
    assert rounded != pytest.approx(expected, rel=1e-4)


SAME = {
    "full rank": correlated(0, 500, 96),
    "fewer rows than columns": correlated(0, 40, 96),
    "far from zero": correlated(0, 500, 96) + 1e4,
    "single precision": correlated(0, 500, 96).astype(np.float32),
    "zeros": np.zeros((5, 7)),
}


@pytest.mark.parametrize("x", SAME.values(), ids=SAME)
def test_zero_with_itself(x: np.ndarray) -> None:
    found = statistics(x)
    again = statistics(x[np.random.default_rng(0).permutation(len(x))])
    for other in (found, again):
        distance = frechet_between(found, other)
        assert 0 <= distance <= 1e-9 * np.trace(found.sigma)


def test_never_negative_with_statistics_of_single_precision() -> None:
    """A file of float32 is not quite a covariance when it is singular; its distance to itself stays 0, not below."""
    found = statistics(correlated(0, 40, 96))
    rounded = Statistics(found.mu, found.sigma.astype(np.float32).astype(np.float64))
    assert np.linalg.eigvalsh(rounded.sigma)[0] < 0
    for other in (found, rounded):
        distance = frechet_between(rounded, other)
        assert 0 <= distance < 1e-4 * np.trace(found.sigma)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "features a must be .* at least 2 rows"),
        (np.zeros((5, 3)), np.zeros(5), "features b must be"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "same width, got 3 and 4"),
        (np.zeros((5, 3)), np.where(np.arange(15).reshape(5, 3) == 7, np.nan, 0), "in 1 of 5 rows; the first is row 2"),
        (np.zeros((5, 3), complex), np.zeros((5, 3)), "must hold real numbers, they are complex128"),
        (np.full((5, 3), 1e200) * np.arange(5)[:, None], np.zeros((5, 3)), "not finite"),
    ],
    ids=["one row", "one axis", "widths", "nan", "complex", "too large"],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_bad_features(a: np.ndarray, b: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        frechet_distance(a, b)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("b", "says"),
    [
        (Statistics(np.zeros(4), np.eye(4)), "same width"),
        (Statistics(np.zeros(3), np.eye(4)), r"statistics b: mu must be \(k,\)"),
        (Statistics(np.zeros(3), np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])), "b: sigma is no covariance.* -1 to 3"),
        (Statistics(np.zeros(3), np.diag([1, np.inf, 1])), "statistics b: .*not finite"),
    ],
    ids=["widths", "shapes", "indefinite", "infinite"],
)
def test_bad_statistics(b: Statistics, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        frechet_between(Statistics(np.zeros(3), np.eye(3)), b)
