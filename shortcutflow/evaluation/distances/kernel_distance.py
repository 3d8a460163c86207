"""The kernel distance (KID): the squared maximum mean discrepancy of two sets of features (Bińkowski et al. 2018)."""

from __future__ import annotations

import numpy as np

from shortcutflow.evaluation.distances.statistics import MeanStd, require_features


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> MeanStd:
    """KID of features (n, k) and (m, k): the unbiased discrepancy under the kernel (x.y / k + 1)^3, over subsets.

    A set with fewer rows than ``subset_size`` makes all subsets smaller, as in clean-fid: the estimate is unbiased at
    any size, so the mean stays comparable; the deviation does not. Being unbiased, it is below 0 for about half of all
    pairs of sets that follow one distribution. Computed in float64.

    Args:
        subsets: pairs of subsets drawn, each without repetition.
        subset_size: rows in a subset; memory is three matrices of this size squared.
        seed: of the draws.

    Returns:
        Mean and standard deviation over the subsets; the mean is the KID (some report it times 1000).

    Raises:
        ValueError: for fewer than two rows, different widths, values that are not finite, or impossible numbers.
    """
    require_features("features a", a, rows=2)
    require_features("features b", b, rows=2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have the same width, got {a.shape[1]} and {b.shape[1]}")
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"subsets must be at least 1 and subset_size at least 2, got subsets={subsets}, subset_size={subset_size}"
        )
    size = min(len(a), len(b), subset_size)
    rng = np.random.default_rng(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        # Drawn in clean-fid's order, b first, so that the same draws give the same number there.
        y = b[rng.choice(len(b), size, replace=False)].astype(np.float64)
        x = a[rng.choice(len(a), size, replace=False)].astype(np.float64)
        values[i] = _discrepancy(x, y)
    return MeanStd(float(values.mean()), float(values.std()))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of two sets of one size m: pairs of a row with itself are left out within a set."""
    m = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base
