"""The Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import numpy as np

from shortcutflow.evaluation.distances.statistics import Moments, Statistics, require_features, require_statistics

NOT_A_COVARIANCE = 1e-3
"""A negative eigenvalue of this fraction of the largest is no rounding, not even that of float32 files."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of features (n, k) and (m, k), in float64; see ``frechet_between``.

    Raises:
        ValueError: for fewer than two rows, different widths, or values that are not finite.
    """
    found = []
    for name, x in (("a", a), ("b", b)):
        require_features(f"features {name}", x, rows=2)
        moments = Moments()
        moments.add(x)
        found.append(moments.statistics())
    return frechet_between(*found)


def frechet_between(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians.

    With factors S_a = A A^T and S_b = B B^T, the trace of the root is the sum of the singular values of A^T B. No
    matrix root, and no root of a rounded number either: the eigenvalues of S_a S_b are the squares of those singular
    values, so their rounding of 1e-16 would be 1e-8 in each root, thousands of times over when there are fewer rows
    than columns.

    The distance cannot be negative, and rounding is about 1e-13 of the traces; a result below 0 is returned as 0, as
    that is what it stands for. So sets with themselves give 0, or a number as small as that.

    Raises:
        ValueError: for different widths, or what is no mean and covariance.
    """
    require_statistics("statistics a", a)
    require_statistics("statistics b", b)
    if len(a.mu) != len(b.mu):
        raise ValueError(f"features must have the same width, got {len(a.mu)} and {len(b.mu)}")
    difference = a.mu - b.mu
    cross = _factor("statistics a", a.sigma).T @ _factor("statistics b", b.sigma)
    roots = np.linalg.svd(cross, compute_uv=False).sum() if cross.size else 0.0
    distance = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * roots
    return max(float(distance), 0.0)


def _factor(name: str, sigma: np.ndarray) -> np.ndarray:
    """F (k, r) with F F^T = sigma: Cholesky's, or for a singular sigma the eigenvectors that are not rounding."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
    if values[0] < -NOT_A_COVARIANCE * values[-1]:
        raise ValueError(
            f"{name}: sigma is no covariance, its eigenvalues go from {values[0]:.3g} to {values[-1]:.3g}; none may be "
            "negative"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
