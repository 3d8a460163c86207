"""Mean and covariance of features: summed batch by batch, kept in an .npz file in the layout of FID's authors."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from shortcutflow.distributed import World
from shortcutflow.io.atomic import write_whole

WIDEST = 8192
"""Features; Inception's pool has 2048."""

BLOCK = 4096
"""Rows that are turned into float64 at once: 64 MB of Inception features."""


class MeanStd(NamedTuple):
    """Mean and standard deviation of a number over parts of the samples."""

    mean: float
    std: float


class Statistics(NamedTuple):
    """Moments of features: mu (k,) and sigma (k, k), float64."""

    mu: np.ndarray
    sigma: np.ndarray


def load_statistics(path: Path | str) -> Statistics:
    """Read ``mu`` and ``sigma``, without unpickling, and no more than ``WIDEST`` features.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with one line that says what is wrong: no .npz, an array missing, of the wrong shape or type,
            numbers that are not finite, or a covariance that is not symmetric.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as file:
            sizes = [info.file_size for info in file.infolist() if info.filename in ("mu.npy", "sigma.npy")]
        if sizes and max(sizes) > 8 * WIDEST**2 + 1000:
            raise ValueError(f"an array has {max(sizes)} bytes; at most {WIDEST} features are allowed")
        with np.load(path, allow_pickle=False) as archive:
            for name in ("mu", "sigma"):
                if name not in archive.files:
                    raise ValueError(f"there must be an array {name!r}; it holds: {', '.join(archive.files[:5])}")
            mu, sigma = archive["mu"], archive["sigma"]
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} holds no FID statistics: {' '.join(str(error).split())}") from None
    for name, array in (("mu", mu), ("sigma", sigma)):
        if array.dtype.newbyteorder("=") not in (np.dtype("f4"), np.dtype("f8")):
            raise ValueError(f"{path}: {name} must hold float32 or float64, it is {array.dtype}")
    found = Statistics(mu.astype(np.float64), sigma.astype(np.float64))
    require_statistics(str(path), found)
    return found


def save_statistics(path: Path | str, statistics: Statistics) -> None:
    """Write ``mu`` and ``sigma`` as float64 in the authors' layout; the file is whole or not there.

    Equal statistics give equal files.

    Raises:
        ValueError: for what ``load_statistics`` would refuse.
        OSError: if the file cannot be written.
    """
    if statistics.mu.size > WIDEST:
        raise ValueError(f"the statistics are of {statistics.mu.size} features; at most {WIDEST} are allowed")
    require_statistics("the statistics", statistics)
    file = io.BytesIO()
    np.savez(file, mu=statistics.mu.astype("<f8"), sigma=np.ascontiguousarray(statistics.sigma, "<f8"))
    write_whole(Path(path), file.getvalue())


def statistics_hash(statistics: Statistics) -> str:
    """Sha256 (hex) of the numbers of mu and sigma, as float64: the same for a file and its compressed copy."""
    digest = hashlib.sha256()
    for array in statistics:
        digest.update(np.ascontiguousarray(array, "<f8").data)
    return digest.hexdigest()


def require_statistics(name: str, statistics: Statistics) -> None:
    """Raise ValueError, which ``name`` begins, for what is no mean and covariance."""
    mu, sigma = statistics
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{name}: mu must be (k,) and sigma (k, k), they are {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mu or sigma hold numbers that are not finite")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max():
        raise ValueError(f"{name}: sigma is not symmetric, so it is no covariance")
    if (np.diag(sigma) < 0).any():
        raise ValueError(f"{name}: sigma has a negative variance on its diagonal")


def require_features(name: str, features: np.ndarray, rows: int = 0) -> None:
    """Raise ValueError for what is no (n, k) array of finite real numbers with at least ``rows`` rows."""
    if features.ndim != 2 or len(features) < rows or features.shape[1] == 0:
        least = f" with at least {rows} row{'s' * (rows > 1)}" if rows else ""
        raise ValueError(f"{name} must be (n, k){least}, got {features.shape}")
    if features.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers, they are {features.dtype}")
    finite = np.isfinite(features)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(1))
        raise ValueError(
            f"{name} hold values that are not finite, in {len(bad)} of {len(features)} rows; the first is row {bad[0]}"
        )


@dataclass
class Moments:
    """Mean and covariance of features that come batch by batch, in float64.

    Each batch is centred on its own mean and added by the rule of Chan, Golub and LeVeque (1983), so features far from
    0 lose nothing, unlike sums of squares; order and sizes of the batches change the result by rounding only.

    Args:
        count: rows so far.
        mean: (k,), of them.
        scatter: (k, k), their centred sum of outer products.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: np.ndarray) -> None:
        """Take in rows (n, k) of any real type; n may be 0.

        Raises:
            ValueError: for another number of axes, another width than before, or values that are not finite.
        """
        require_features("features", features)
        width = features.shape[1]
        if self.count == 0:
            self.mean, self.scatter = np.zeros(width), np.zeros((width, width))
        elif width != len(self.mean):
            raise ValueError(f"features must have the same width, got {len(self.mean)} and then {width}")
        for start in range(0, len(features), BLOCK):
            rows = features[start : start + BLOCK].astype(np.float64)
            mean = rows.mean(0)
            rows -= mean
            delta = mean - self.mean
            total = self.count + len(rows)
            # The shift between the old mean and this batch's enters as one more row: one product, no second matrix.
            shift = delta * math.sqrt(self.count * len(rows) / total)
            rows = np.concatenate([rows, shift[None]])
            self.scatter += rows.T @ rows
            self.mean += delta * ((total - self.count) / total)
            self.count = total

    def statistics(self) -> Statistics:
        """The mean (k,) and the unbiased covariance (k, k), as ``np.cov`` divides: by the number of rows less one.

        Raises:
            ValueError: for fewer than two rows, or numbers whose squares pass float64.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows of features, got {self.count}")
        found = Statistics(self.mean.copy(), self.scatter / (self.count - 1))
        if not np.isfinite(found.sigma).all():
            raise ValueError("the features are so large that their covariance is not finite")
        return found

    def all_reduced(self, world: World) -> Moments:
        """The moments of the rows of all ranks, in each; every rank must call this."""
        count, width = (int(reduced) for reduced in (
            world.sum(torch.tensor(self.count)), world.max(torch.tensor(len(self.mean)))
        ))  # fmt: skip
        own = self if self.count else Moments(0, np.zeros(width), np.zeros((width, width)))
        mean = world.sum(torch.from_numpy(own.mean * own.count)).numpy() / max(count, 1)
        shift = (own.mean - mean) * math.sqrt(own.count)
        return Moments(count, mean, world.sum(torch.from_numpy(own.scatter + np.outer(shift, shift))).numpy())
