"""The authors' FID statistics: mean and covariance of Inception features, in an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

WIDEST = 8192
"""Features; Inception's pool has 2048."""


class Statistics(NamedTuple):
    """Moments of features: mu (k,) and sigma (k, k), float64."""

    mu: np.ndarray
    sigma: np.ndarray


def load_statistics(path: Path | str) -> Statistics:
    """Read ``mu`` and ``sigma``, without unpickling and without believing more than the file can hold.

    Raises:
        ValueError: with one line that says what is wrong: no .npz, an array missing, of the wrong shape or type,
            numbers that are not finite, or a covariance that is not symmetric.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            mu, sigma = _member(archive, "mu"), _member(archive, "sigma")
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} holds no FID statistics: {error}") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: mu must be (k,) and sigma (k, k), they are {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu or sigma hold numbers that are not finite")
    if np.abs(sigma - sigma.T).max(initial=0) > 1e-6 * np.abs(sigma).max(initial=0):
        raise ValueError(f"{path}: sigma is not symmetric, so it is no covariance")
    if (np.diag(sigma) < 0).any():
        raise ValueError(f"{path}: sigma has a negative variance on its diagonal")
    return Statistics(mu, sigma)


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    infos = [info for info in archive.infolist() if info.filename == f"{name}.npy"]
    if len(infos) != 1:
        there = ", ".join(info.filename.removesuffix(".npy") for info in archive.infolist()[:5])
        raise ValueError(f"there must be one array {name!r}; it holds: {there}")
    with archive.open(infos[0]) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} is written in version {version} of .npy, not (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.newbyteorder("=") not in (np.dtype("f4"), np.dtype("f8")):
            raise ValueError(f"{name} must hold float32 or float64, it is {dtype}")
        if len(shape) > 2 or any(size > WIDEST for size in shape):
            raise ValueError(f"{name} has shape {shape}; at most {WIDEST} features are allowed")
        count = int(np.prod(shape, dtype=np.int64))
        # The header is checked against the size the archive states before any memory is asked for.
        if count * dtype.itemsize > infos[0].file_size:
            raise ValueError(f"{name} claims {count} numbers, more than its {infos[0].file_size} bytes hold")
        content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise ValueError(f"{name} is cut off")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(np.float64)
