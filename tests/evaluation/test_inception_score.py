"""The inception score against torch-fidelity, a loop over the definition and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from shortcutflow.evaluation.distances.inception_score import inception_score
from shortcutflow.evaluation.distances.statistics import MeanStd


def logits(rows: int = 205, classes: int = 12, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(rows, classes)) * scale).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).double().softmax(1).numpy()


def by_definition(p: np.ndarray) -> float:
    marginal = p.mean(0).tolist()
    kl = [sum(a * math.log(a / b) for a, b in zip(row, marginal, strict=True) if a > 0) for row in p.tolist()]
    return math.exp(sum(kl) / len(kl))


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_equals_the_definition(splits: int) -> None:
    x = logits()
    parts = [softmax(x)[i * 205 // splits : (i + 1) * 205 // splits] for i in range(splits)]
    scores = [by_definition(p) for p in parts]
    found = inception_score(x, splits=splits, seed=None)
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10, abs=1e-12)
    # Negative control: the divergence from the uniform distribution instead of the samples' own mean.
    uniform = np.mean([math.exp(math.log(12) + (p * np.log(p)).sum(1).mean()) for p in parts])
    assert found.mean != pytest.approx(uniform, rel=1e-3)


@pytest.mark.parametrize("rows", [200, 205])
def test_equals_torch_fidelity(rows: int) -> None:
    isc = pytest.importorskip("torch_fidelity.metric_isc", reason="another implementation to compare with")
    x = logits(rows)
    found = isc.isc_features_to_metric(torch.from_numpy(x), splits=10, shuffle=False)
    expected = (found["inception_score_mean"], found["inception_score_std"])
    assert inception_score(x, seed=None) == pytest.approx(expected, rel=1e-9)
    assert inception_score(2 * x, seed=None) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_closed_forms(classes: int) -> None:
    rows = 20 * classes
    same = np.random.default_rng(0).normal(size=classes)
    for x in (np.zeros((rows, classes)), np.tile(same, (rows, 1))):
        assert inception_score(x) == pytest.approx((1, 0), abs=1e-9)
    sure = np.tile(np.eye(classes), (20, 1))
    for x in (1000 * sure, 1000 * sure - 5000):
        found = inception_score(x, seed=None)
        assert found == pytest.approx((classes, 0), rel=1e-9, abs=1e-9)
    half = 0.5 * sure + 0.5 / classes
    entropy = -(0.5 + 0.5 / classes) * math.log(0.5 + 0.5 / classes)
    entropy -= (classes - 1) * 0.5 / classes * math.log(0.5 / classes)
    assert inception_score(np.log(half), seed=None).mean == pytest.approx(classes * math.exp(-entropy), rel=1e-9)


def test_sorted_samples_are_shuffled() -> None:
    x = 1000 * np.repeat(np.eye(10), 100, 0)
    assert inception_score(x, seed=None) == pytest.approx((1, 0), abs=1e-9)
    found = inception_score(x)
    assert 9 < found.mean <= 10
    assert inception_score(x) == found
    assert inception_score(x, seed=1) != found
    assert inception_score(x, splits=1) == pytest.approx((10, 0))


def test_few_samples_score_low() -> None:
    """Why the protocol needs its 50,000: the score of a split cannot pass its number of rows."""
    sure = 1000 * np.eye(100)
    assert inception_score(sure, splits=10) == pytest.approx((10, 0), rel=1e-9, abs=1e-9)
    assert isinstance(inception_score(sure), MeanStd)


@pytest.mark.parametrize(
    ("x", "options", "says"),
    [
        (np.zeros((9, 3)), {}, r"class scores must be \(n, k\) with at least 10 rows, got \(9, 3\)"),
        (np.zeros(9), {"splits": 1}, "class scores must be"),
        (np.zeros((9, 3)), {"splits": 0}, "splits must be at least 1, got 0"),
        (np.full((9, 3), np.nan), {"splits": 3}, "not finite"),
        (softmax(logits(9)), {"splits": 3}, "these class scores are probabilities, logits are needed"),
    ],
    ids=["few rows", "one axis", "no splits", "nan", "not logits"],
)
def test_refused(x: np.ndarray, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        inception_score(x, **options)
