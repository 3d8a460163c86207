"""The kernel distance against clean-fid, torchmetrics, torch-fidelity, a double loop and its own expectation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from shortcutflow.evaluation.distances.kernel_distance import kernel_distance


def features(seed: int, rows: int, width: int = 16, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)) + shift


def test_equals_a_double_loop() -> None:
    a, b = features(0, 12, 5), features(1, 12, 5, 0.5)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / 5 + 1) ** 3

    within = sum(kernel(x[i], x[j]) for x in (a, b) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    across = sum(kernel(x, y) for x in a for y in b) / 12**2
    found = kernel_distance(a, b, subsets=3, subset_size=12)
    assert found.mean == pytest.approx(within - 2 * across, rel=1e-10)
    assert found.std < 1e-12  # each subset is the whole set in another order
    with_self = sum(kernel(x[i], x[j]) for x in (a, b) for i in range(12) for j in range(12)) / 12**2
    assert found.mean != pytest.approx(with_self - 2 * across, rel=0.1)


@pytest.mark.parametrize("sizes", [(60, 60, 60), (80, 50, 1000), (80, 70, 30)], ids=["all", "capped", "subsets"])
def test_equals_clean_fid_with_the_same_draws(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from cleanfid import fid

    a, b = features(0, sizes[0]), features(1, sizes[1], shift=0.3)
    monkeypatch.setattr(np.random, "choice", np.random.default_rng(7).choice)
    expected = fid.kernel_distance(a, b, num_subsets=5, max_subset_size=sizes[2])
    assert kernel_distance(a, b, subsets=5, subset_size=sizes[2], seed=7).mean == pytest.approx(expected, rel=1e-10)
    if len(a) > sizes[2]:
        other = kernel_distance(a, b, subsets=5, subset_size=sizes[2], seed=8).mean
        assert other != pytest.approx(expected, rel=1e-6)


def by_torchmetrics(a: np.ndarray, b: np.ndarray) -> float:
    kid = pytest.importorskip("torchmetrics.image.kid", reason="another implementation to compare with")
    return float(kid.poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))


def by_torch_fidelity(a: np.ndarray, b: np.ndarray) -> float:
    kid = pytest.importorskip("torch_fidelity.metric_kid", reason="another implementation to compare with")
    options = {"kid_subsets": 2, "kid_subset_size": len(a), "verbose": False}
    found = kid.kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **options)
    return float(found["kernel_inception_distance_mean"])


@pytest.mark.parametrize("other", [by_torchmetrics, by_torch_fidelity])
def test_equals_other_implementations(other: Callable[[np.ndarray, np.ndarray], float]) -> None:
    a, b = features(0, 200), features(1, 200, shift=0.2)
    assert kernel_distance(a, b, subsets=1, subset_size=200).mean == pytest.approx(other(a, b), rel=1e-6)


def test_unbiased_and_repeatable() -> None:
    """Over many pairs of sets from one distribution the mean is 0 within its error; a shift is far outside it."""
    same = [kernel_distance(features(2 * i, 40), features(2 * i + 1, 40), subsets=1).mean for i in range(200)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3 * error
    assert min(same) < 0 < max(same)
    # E k(x, y) with means apart is known: for one feature, E (xy + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3.
    a, b = features(0, 4000, 1), features(1, 4000, 1, shift=1.0)
    expected = 3 * (0 - 1) ** 2 + 3 * (1 - 2) ** 2 + (0 - 4) ** 2
    assert kernel_distance(a, b, subsets=1, subset_size=4000).mean == pytest.approx(expected, rel=0.15)
    assert expected > 100 * error


def test_seed_and_spread() -> None:
    a, b = features(0, 300), features(1, 300, shift=0.2)
    found = kernel_distance(a, b, subsets=20, subset_size=50)
    # The global generator is neither read nor moved.
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert kernel_distance(a, b, subsets=20, subset_size=50) == found
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert kernel_distance(a, b, subsets=20, subset_size=50, seed=1) != found
    values = [kernel_distance(a, b, subsets=1, subset_size=50, seed=i).mean for i in range(60)]
    assert found.std == pytest.approx(np.std(values), rel=0.5)
    assert found.mean == pytest.approx(np.mean(values), abs=4 * found.std / np.sqrt(20))


def test_single_precision_is_computed_in_double() -> None:
    a, b = features(0, 100).astype(np.float32), features(1, 100).astype(np.float32)
    wide = kernel_distance(a.astype(np.float64), b.astype(np.float64), subsets=2)
    assert kernel_distance(a, b, subsets=2) == wide


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"a": np.zeros((1, 3))}, "features a must be .* at least 2 rows"),
        ({"b": np.zeros((5, 4))}, "same width, got 3 and 4"),
        ({"b": np.full((5, 3), np.inf)}, "features b hold values that are not finite"),
        ({"subsets": 0}, "subsets must be at least 1 .* got subsets=0"),
        ({"subset_size": 1}, "subset_size at least 2, got .*subset_size=1"),
    ],
    ids=["one row", "widths", "infinite", "no subsets", "subsets of one"],
)
def test_refused(options: dict, says: str) -> None:
    given = {"a": np.zeros((5, 3)), "b": np.zeros((5, 3))} | options
    with pytest.raises(ValueError, match=says):
        kernel_distance(given.pop("a"), given.pop("b"), **given)
