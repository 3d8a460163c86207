"""The inception score (Salimans et al. 2016): classes that are sure for each sample and varied over all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shortcutflow.evaluation.distances.statistics import require_features


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits; from 1 to the number of classes."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int | None = 0) -> InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)) in each split, p(y) being the split's mean; in float64.

    Args:
        logits: a classifier's (n, classes); or its probabilities, known by having no negative number and rows of sum 1.
        splits: parts of (nearly) one size.
        seed: of the shuffling before the splits are cut. Samples often come sorted by class, and a split of one class
            scores 1. ``None`` keeps the order, as the authors of the score do.

    Raises:
        ValueError: for fewer rows than splits, values that are not finite, or rows that look like probabilities but do
            not add up to 1.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    require_features("logits", logits, rows=splits)
    given_probabilities = _are_probabilities(logits)
    count = len(logits)
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    scores = []
    for i in range(splits):
        p = logits[order[i * count // splits : (i + 1) * count // splits]].astype(np.float64)
        if not given_probabilities:
            p = np.exp(p - p.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        scores.append(np.exp(_entropy(p.mean(0)) - _entropy(p).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _are_probabilities(x: np.ndarray) -> bool:
    if (x < 0).any():
        return False
    off = np.abs(x.sum(1, dtype=np.float64) - 1)
    if (off < 1e-3).all():
        return True
    if (off < 0.1).all():
        raise ValueError(
            f"rows must be logits, or probabilities with sum 1; these are not negative and off by up to {off.max():.2g}"
        )
    return False


def _entropy(p: np.ndarray) -> np.ndarray:
    """- sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
