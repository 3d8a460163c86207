"""Statistics of features: gathered in parts, and read from files of which nothing is believed that they cannot hold."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from shortcutflow.evaluation.distances.statistics import (
    WIDEST,
    Moments,
    Statistics,
    load_statistics,
    save_statistics,
    statistics_hash,
)


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
    "no sigma": ({"sigma": None}, "an array 'sigma'; it holds: mu"),
    "other width": ({"mu": np.zeros(4)}, r"mu must be \(k,\)"),
    "matrix as mean": ({"mu": np.zeros((5, 1))}, r"mu must be \(k,\)"),
    "not symmetric": ({"sigma": not_symmetric(moments()[1])}, "not symmetric"),
    "nan": ({"sigma": with_nan(moments()[1])}, "not finite"),
    "negative variance": ({"sigma": -moments()[1]}, "negative variance"),
    "whole numbers": ({"mu": np.zeros(5, int)}, "float32 or float64"),
    "objects": ({"mu": np.array([{}, 1], object)}, "Object arrays cannot be loaded"),
    "three axes": ({"sigma": np.zeros((5, 5, 1))}, r"they are \(5,\) and \(5, 5, 1\)"),
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


def test_an_array_that_would_unpack_to_too_much(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mu.npy", "w") as mu:
        for _ in range(520):
            mu.write(bytes(2**20))
    assert (tmp_path / "s.npz").stat().st_size < 2**20
    with pytest.raises(ValueError, match="at most 8192 features are allowed"):
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


def test_saved_as_the_authors_save(tmp_path: Path) -> None:
    statistics = Statistics(*moments())
    save_statistics(tmp_path / "s.npz", statistics)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["mu", "sigma"]
        assert archive["mu"].dtype == archive["sigma"].dtype == np.dtype("<f8")
    found = load_statistics(tmp_path / "s.npz")
    assert np.array_equal(found.mu, statistics.mu)
    assert np.array_equal(found.sigma, statistics.sigma)
    first = (tmp_path / "s.npz").read_bytes()
    save_statistics(tmp_path / "s.npz", Statistics(statistics.mu, np.asfortranarray(statistics.sigma)))
    assert (tmp_path / "s.npz").read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["s.npz"]


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path: Path) -> None:
    for statistics, says in (
        (Statistics(np.zeros(5), not_symmetric(moments()[1])), "not symmetric"),
        (Statistics(np.zeros(4), moments()[1]), r"mu must be \(k,\)"),
        (Statistics(np.zeros(0), np.zeros((0, 0))), r"mu must be \(k,\)"),
        (Statistics(np.zeros(WIDEST + 1), np.broadcast_to(0.0, (WIDEST + 1, WIDEST + 1))), "at most 8192"),
    ):
        with pytest.raises(ValueError, match=says):
            save_statistics(tmp_path / "s.npz", statistics)
    assert not list(tmp_path.iterdir())


def test_hash_is_of_the_numbers(tmp_path: Path) -> None:
    mu, sigma = moments()
    mu, sigma = mu.astype("f4").astype("f8"), sigma.astype("f4").astype("f8")
    expected = hashlib.sha256(mu.astype("<f8").tobytes() + sigma.astype("<f8").tobytes()).hexdigest()
    assert statistics_hash(Statistics(mu, sigma)) == expected
    np.savez_compressed(tmp_path / "s.npz", mu=mu.astype(">f4"), sigma=np.asfortranarray(sigma))
    assert statistics_hash(load_statistics(tmp_path / "s.npz")) == expected
    assert statistics_hash(Statistics(mu, np.asfortranarray(sigma).astype(">f8"))) == expected
    assert statistics_hash(Statistics(np.nextafter(mu, 1), sigma)) != expected


def gathered(x: np.ndarray, *ends: int) -> Statistics:
    found = Moments()
    for part in np.split(x, ends):
        found.add(part)
    assert found.count == len(x)
    return found.statistics()


def far(mean: float, rows: int = 5000, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, width)) @ (np.eye(width) + 0.3 * rng.normal(size=(width, width))) + mean


def exact(x: np.ndarray) -> np.ndarray:
    """The covariance in whole numbers of unlimited size, rounded once."""
    scale = 2**60
    rows = [[int(Fraction(value) * scale) for value in row] for row in x.tolist()]
    n, k = len(rows), len(rows[0])
    sums = [sum(row[i] for row in rows) for i in range(k)]
    products = [[sum(row[i] * row[j] for row in rows) for j in range(k)] for i in range(k)]
    table = [[Fraction(n * products[i][j] - sums[i] * sums[j], n * (n - 1)) for j in range(k)] for i in range(k)]
    return np.array([[float(value / scale**2) for value in row] for row in table])


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_moments_far_from_zero(mean: float) -> None:
    x = far(mean, rows=600, width=3)
    x[0] += 50  # the first row stands for nothing
    expected = exact(x)
    found = gathered(x, 1, 2, 100, 350)
    assert np.abs(found.sigma - expected).max() < 1e-9
    assert np.abs(found.mu - x.mean(0)).max() <= 1e-12 * max(mean, 1)
    if mean:
        # Negative control: sums of squares in float64 would not keep nine digits.
        naive = (x.T @ x - len(x) * np.outer(x.mean(0), x.mean(0))) / (len(x) - 1)
        assert np.abs(naive - expected).max() > 1e-9


def test_order_and_sizes_of_parts_do_not_matter() -> None:
    x = far(0.5)
    whole = gathered(x)
    assert np.allclose(whole.sigma, np.cov(x, rowvar=False), rtol=1e-12, atol=0)
    for parts in (gathered(x, 1, 1, 2, 7, 4999), gathered(x[::-1], 1000, 3000), gathered(x, *range(0, 5000, 37))):
        assert np.abs(parts.mu - whole.mu).max() < 1e-12 * np.abs(whole.mu).max()
        assert np.abs(parts.sigma - whole.sigma).max() < 1e-12 * np.abs(whole.sigma).max()
    assert np.abs(gathered(x[:-1]).sigma - whole.sigma).max() > 1e-9


def test_what_was_handed_out_is_not_changed_by_what_comes_later() -> None:
    moments = Moments()
    moments.add(far(1e3))
    before = moments.statistics()
    seen = statistics_hash(before)
    moments.add(far(1e3)[:5])
    assert statistics_hash(before) == seen != statistics_hash(moments.statistics())


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "u1", "i8"])
def test_any_real_type_is_summed_in_float64(dtype: str) -> None:
    x = (far(0, rows=300) * 8 + 100).astype(dtype)
    kept = x.copy()
    found = gathered(x, 100)
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert np.allclose(found.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-11)
    assert np.array_equal(x, kept)


def test_moments_refuse() -> None:
    found = Moments()
    for rows in (0, 1):
        found.add(np.ones((rows, 3)))
        with pytest.raises(ValueError, match=f"at least 2 rows of features, got {rows}"):
            found.statistics()
    for part, says in (
        (np.ones((2, 4)), "same width, got 3 and then 4"),
        (np.ones(3), r"must be \(n, k\), got \(3,\)"),
        (np.ones((2, 0)), r"must be \(n, k\), got \(2, 0\)"),
        (np.array([[1, 1, 1], [1, np.inf, np.nan], [np.nan, 1, 1]]), "not finite, in 2 of 3 rows; the first is row 1"),
        (np.ones((2, 3), bool), "real numbers, they are bool"),
    ):
        with pytest.raises(ValueError, match=says):
            found.add(part)
    found.add(np.zeros((1, 3)))
    assert found.count == 2
    assert np.allclose(found.statistics().sigma, 0.5, rtol=1e-15)
