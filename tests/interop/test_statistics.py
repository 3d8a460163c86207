"""The authors' FID statistics: read without unpickling, checked, and nothing believed that the file cannot hold."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shortcutflow.interop.statistics import load_statistics


def moments(k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(50, k))
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["plain", "compressed"])
@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8"])
def test_read_as_written(save, dtype: str, tmp_path: Path) -> None:
    mu, sigma = (array.astype(dtype) for array in moments())
    save(tmp_path / "s.npz", mu=mu, sigma=np.asfortranarray(sigma), other=np.zeros(3))
    found = load_statistics(tmp_path / "s.npz")
    assert np.array_equal(found.mu, mu)
    assert np.array_equal(found.sigma, sigma)
    assert found.mu.dtype == found.sigma.dtype == np.dtype("f8")


def not_symmetric(sigma: np.ndarray) -> np.ndarray:
    sigma = sigma.copy()
    sigma[0, 1] += 0.1
    return sigma


def with_nan(sigma: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(sigma)), np.nan, sigma)


WRONG = {
    "no sigma": ({"sigma": None}, "one array 'sigma'; it holds: mu"),
    "other width": ({"mu": np.zeros(4)}, r"mu must be \(k,\)"),
    "matrix as mean": ({"mu": np.zeros((5, 1))}, r"mu must be \(k,\)"),
    "not symmetric": ({"sigma": not_symmetric(moments()[1])}, "not symmetric"),
    "nan": ({"sigma": with_nan(moments()[1])}, "not finite"),
    "negative variance": ({"sigma": -moments()[1]}, "negative variance"),
    "whole numbers": ({"mu": np.zeros(5, int)}, "float32 or float64"),
    "objects": ({"mu": np.array([{}, 1], object)}, "float32 or float64"),
    "three axes": ({"sigma": np.zeros((5, 5, 1))}, "has shape"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_refused(changes: dict[str, np.ndarray | None], says: str, tmp_path: Path) -> None:
    mu, sigma = moments()
    arrays = {name: array for name, array in ({"mu": mu, "sigma": sigma} | changes).items() if array is not None}
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=says) as error:
        load_statistics(tmp_path / "s.npz")
    assert len(str(error.value).splitlines()) == 1


def test_headers_that_promise_more_than_there_is(tmp_path: Path) -> None:
    for shape in ("(100000000000,)", "(8192, 8192)", "(-1,)"):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(40)
        with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
            archive.writestr("mu.npy", content)
            archive.writestr("sigma.npy", content)
        with pytest.raises(ValueError, match=r"s\.npz"):
            load_statistics(tmp_path / "s.npz")


def test_every_cut_and_other_files(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.savez(file, mu=moments()[0], sigma=moments()[1])
    whole, path = file.getvalue(), tmp_path / "s.npz"
    for content in [whole[: len(whole) * i // 50] for i in range(50)] + [b"", b"text"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"s\.npz holds no FID statistics"):
            load_statistics(path)
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "none.npz")
