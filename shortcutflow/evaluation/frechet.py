"""The Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, k) and (m, k), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric: no
    dense matrix root, and singular covariances do no harm.

    Raises:
        ValueError: for fewer than two rows, different widths, or values that are not finite.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"features {name} must be (n, k) with at least two rows, got {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"features {name} hold values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have the same width, got {a.shape[1]} and {b.shape[1]}")
    mean_a, cov_a = _moments(a)
    mean_b, cov_b = _moments(b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross.clip(min=0)).sum())


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))
