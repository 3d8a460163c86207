"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of two sets of features.

Both draw a ball around each sample, as wide as the way to its k-th nearest neighbour of the same set, and count which
samples of the other set lie inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shortcutflow.evaluation.distances.statistics import require_features

TIE = 1e-13
"""Squared distances are equal if they differ by this fraction of the squared lengths; products round by about 1e-14."""


class Manifold(NamedTuple):
    """Fractions from 0 to 1, but for the density, which is about 1 for sets of one distribution and may pass it.

    Attributes:
        precision: fake samples that lie in a ball of a real one (the rim included).
        recall: real samples that lie in a ball of a fake one (the rim included).
        density: real balls that a fake sample lies in (the rim excluded), divided by k.
        coverage: real balls with a fake sample in them (the rim excluded).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(
    real: np.ndarray,
    fake: np.ndarray,
    *,
    k_precision: int = 3,
    k_density: int = 5,
    batch: int = 2048,
    device: torch.device | str = "cpu",
) -> Manifold:
    """The four metrics of features (n, k) and (m, k); every pair is compared, nothing is drawn.

    Distances are products of float64 tiles, centred first, so that |x|^2 + |y|^2 - 2 x.y does not cancel; distances
    that are equal but for rounding count as equal, whichever tile they come from. Memory beside the features is about
    ten matrices of ``batch`` squared and four of ``batch`` rows.

    Args:
        k_precision: the neighbour that sets the balls of precision and recall, itself not counted (published: 3).
        k_density: the same for density and coverage (published: 5).
        batch: rows of a tile.
        device: where the products are made; it must know float64.

    Raises:
        ValueError: for no more rows than neighbours, different widths, values that are not finite, impossible numbers.
    """
    if min(k_precision, k_density, batch) < 1:
        raise ValueError(
            f"k_precision, k_density and batch must be at least 1, got {k_precision}, {k_density} and {batch}"
        )
    for name, x, k in (("real", real, max(k_precision, k_density)), ("fake", fake, k_precision)):
        require_features(f"{name} features", x)
        if len(x) <= k:
            raise ValueError(f"{len(x)} {name} samples have no {k} neighbours: give more than {k}, or a smaller k")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must have the same width, got {real.shape[1]} and {fake.shape[1]}")
    # One centre does for both: where a fake sample is far from it, no real one is near that sample's ball.
    centre = torch.from_numpy(real.mean(0, dtype=np.float64)).to(device)
    nearest = _neighbours(real, max(k_precision, k_density), centre, batch)
    fake_radius = _neighbours(fake, k_precision, centre, batch)[:, -1]
    real_radius, density_radius = nearest[:, k_precision - 1], nearest[:, k_density - 1]
    n, m = len(real), len(fake)
    precise, recalled, covered = (torch.zeros(size, dtype=torch.bool, device=device) for size in (m, n, n))
    inside = 0
    for rows, a in _tiles(real, centre, batch):
        for columns, b in _tiles(fake, centre, batch):
            squared, tie = _distances(a, b)
            nearer = squared - tie
            precise[columns] |= (nearer <= real_radius[rows, None]).any(0)
            recalled[rows] |= (nearer <= fake_radius[columns]).any(1)
            strictly = squared + tie < density_radius[rows, None]
            covered[rows] |= strictly.any(1)
            inside += int(strictly.sum())
    precision, recall, coverage = (float(found.double().mean()) for found in (precise, recalled, covered))
    return Manifold(precision, recall, inside / (k_density * m), coverage)


def _tiles(features: np.ndarray, centre: Tensor, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """``batch`` rows at a time in float64, with ``centre`` taken off: their slice, and (rows, k)."""
    for start in range(0, len(features), batch):
        rows = slice(start, min(start + batch, len(features)))
        yield rows, torch.from_numpy(features[rows].astype(np.float64)).to(centre.device) - centre


def _neighbours(features: np.ndarray, k: int, centre: Tensor, batch: int) -> Tensor:
    """Squared distances (n, k) of each row to its k nearest others, nearest first."""
    found = []
    for rows, x in _tiles(features, centre, batch):
        best = x.new_empty(len(x), 0)
        for columns, y in _tiles(features, centre, batch):
            squared, _ = _distances(x, y)
            if rows == columns:
                squared.fill_diagonal_(torch.inf)
            best = torch.cat([best, squared.topk(min(k, len(y)), largest=False).values], 1)
            best = best.sort(1).values[:, :k]
        found.append(best)
    return torch.cat(found)


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (a, b) of rows (a, k) and (b, k), and how far each may be off by rounding."""
    lengths = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return torch.addmm(lengths, x, y.T, alpha=-2).clamp_(min=0), lengths * TIE
