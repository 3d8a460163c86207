"""Precision, recall, density and coverage against brute force, torch-fidelity and cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shortcutflow.evaluation.distances.manifold import Manifold, manifold_metrics


def brute_force(real: np.ndarray, fake: np.ndarray, k_precision: int, k_density: int) -> Manifold:
    """The definitions, from differences of coordinates in float64, with no product that could cancel."""
    real, fake = real.astype(np.float64), fake.astype(np.float64)

    def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack([((row - y) ** 2).sum(1) for row in x])

    def radius(x: np.ndarray, k: int) -> np.ndarray:
        return np.sort(squared(x, x), 1)[:, k]

    apart = squared(real, fake)
    strictly = apart < radius(real, k_density)[:, None]
    return Manifold(
        precision=float((apart <= radius(real, k_precision)[:, None]).any(0).mean()),
        recall=float((apart <= radius(fake, k_precision)).any(1).mean()),
        density=float(strictly.sum() / (k_density * len(fake))),
        coverage=float(strictly.any(1).mean()),
    )


def features(seed: int, rows: int, width: int = 8, spread: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, width)) * spread + shift).astype(np.float32)


CASES = {
    "alike": (features(0, 300), features(1, 250)),
    "narrow": (features(0, 300), features(1, 300, spread=0.5)),
    "wide": (features(0, 300), features(1, 300, spread=1.5)),
    "many features": (features(0, 150, 128), features(1, 150, 128, spread=0.97)),
    "far from zero": (features(0, 300, shift=300.0), features(1, 300, shift=300.2)),
    "very far from zero": tuple(x.astype(np.float64) + 1e6 for x in (features(0, 200), features(1, 200))),
    "fake apart but for one": (features(0, 200), np.concatenate([features(1, 199, shift=1e4), features(2, 1)])),
}


@pytest.mark.parametrize("batch", [2048, 64])
@pytest.mark.parametrize("case", CASES)
def test_equals_brute_force(case: str, batch: int) -> None:
    real, fake = CASES[case]
    expected = brute_force(real, fake, 3, 5)
    assert manifold_metrics(real, fake, batch=batch) == expected
    assert {expected.precision, expected.recall} - {0.0, 1.0}


def test_tiles_smaller_than_the_neighbourhood() -> None:
    real, fake = features(0, 23), features(1, 17)
    assert manifold_metrics(real, fake, batch=4) == brute_force(real, fake, 3, 5)


def test_single_precision_products_would_not_do() -> None:
    """What float64 and centring are for: away from zero, |x|^2 + |y|^2 - 2 x.y in float32 loses the distances."""
    real, fake = CASES["far from zero"]
    x, y = torch.from_numpy(real), torch.from_numpy(fake)
    apart = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    within = (x * x).sum(1)[:, None] + (x * x).sum(1) - 2 * x @ x.T
    inside = apart <= within.sort(1).values[:, 3, None]
    assert float(inside.any(0).double().mean()) != manifold_metrics(real, fake).precision


def test_order_and_other_neighbours() -> None:
    real, fake = CASES["wide"]
    for k_precision, k_density in ((1, 1), (5, 3), (20, 40)):
        found = manifold_metrics(real, fake, k_precision=k_precision, k_density=k_density, batch=100)
        assert found == brute_force(real, fake, k_precision, k_density)
    order = np.random.default_rng(0).permutation(300)
    assert manifold_metrics(real[order], fake[order[::-1]], batch=128) == manifold_metrics(real, fake)
    there, back = manifold_metrics(real, fake), manifold_metrics(fake, real)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision < there.recall  # fakes spread too wide


def test_equals_torch_fidelity() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc", reason="another implementation to compare with")
    for case in ("alike", "narrow", "many features"):
        real, fake = CASES[case]
        options = {"prc_neighborhood": 3, "prc_batch_size": 10000, "save_cpu_ram": False, "verbose": False}
        found = prc.prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), **options)
        expected = (found["precision"], found["recall"])
        assert manifold_metrics(real, fake)[:2] == pytest.approx(expected, abs=1e-6)
        assert manifold_metrics(real, fake, k_precision=4)[:2] != pytest.approx(expected, abs=1e-6)


def test_counted_by_hand() -> None:
    """Real 0, 1, 3, 7 on a line have nearest neighbours 1, 1, 2 and 4 away."""
    real = np.array([[0.0], [1.0], [3.0], [7.0]])
    fake = np.array([[2.0], [2.5], [20.0], [-0.5]])
    # Balls (rims included): [-1, 1], [0, 2], [1, 5], [3, 11]. 2 lies in two, one of them on the rim; 2.5 in one; 20 in
    # none; -0.5 in one. Fake neighbours are 0.5, 0.5, 17.5 and 2.5 away: balls [1.5, 2.5], [2, 3], [2.5, 37.5] and
    # [-3, 2] hold all of the real ones.
    found = manifold_metrics(real, fake, k_precision=1, k_density=1)
    assert found == Manifold(precision=3 / 4, recall=1.0, density=3 / 4, coverage=2 / 4)


@pytest.mark.parametrize("batch", [1000, 66])
def test_closed_forms(batch: int) -> None:
    real = features(0, 200, 64)
    assert manifold_metrics(real, features(1, 200, 64, shift=100), batch=batch) == Manifold(0.0, 0.0, 0.0, 0.0)
    # A set with itself: the k-th neighbour lies on the rim, however the products of its tile were rounded.
    order = np.random.default_rng(0).permutation(200)
    assert manifold_metrics(real, real[order], batch=batch) == Manifold(1.0, 1.0, 1.0, 1.0)
    one = np.repeat(real[:1], 200, 0)
    collapsed = manifold_metrics(real, one, batch=batch)
    assert collapsed.precision == 1
    assert collapsed.recall == pytest.approx(1 / 200)
    assert collapsed.coverage < 0.2


def test_same_distribution() -> None:
    """Naeem et al. 2020, sections 3.3: the density's expectation is 1, the coverage's 1 - (about) 1/2^k."""
    found = manifold_metrics(features(0, 1500), features(1, 1500))
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.015)
    assert manifold_metrics(features(0, 1500), features(1, 1500, spread=1.2)).density < 0.9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"real": np.zeros((5, 3))}, "5 real samples have no 5 neighbours: give more than 5"),
        ({"fake": np.zeros((3, 3))}, "3 fake samples have no 3 neighbours"),
        ({"fake": np.zeros((9, 4))}, "same width, got 3 and 4"),
        ({"fake": np.zeros(9)}, "fake features must be"),
        ({"real": np.full((9, 3), np.nan)}, "real features hold values that are not finite, in 9 of 9 rows"),
        ({"k_precision": 0}, "must be at least 1, got 0, 5 and"),
        ({"batch": 0}, "must be at least 1"),
    ],
    ids=["few real", "few fake", "widths", "one axis", "nan", "no neighbour", "no rows"],
)
def test_refused(options: dict, says: str) -> None:
    given = {"real": np.zeros((9, 3)), "fake": np.zeros((9, 3))} | options
    with pytest.raises(ValueError, match=says):
        manifold_metrics(given.pop("real"), given.pop("fake"), **given)
