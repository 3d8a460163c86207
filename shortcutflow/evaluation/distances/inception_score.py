"""The inception score (Salimans et al. 2016): classes that are sure for each sample and varied over all."""

from __future__ import annotations

import numpy as np

from shortcutflow.evaluation.distances.statistics import MeanStd, require_features


def inception_score(scores: np.ndarray, *, splits: int = 10, seed: int | None = 0) -> MeanStd:
    """exp of the mean KL(p(y|x) || p(y)) in each split, p(y) being the split's mean; in float64.

    Args:
        scores: a classifier's (n, classes), before its softmax.
        splits: parts of (nearly) one size.
        seed: of the shuffling before the splits are cut. Samples often come sorted by class, and a split of one class
            scores 1. ``None`` keeps the order, as the authors of the score do.

    Returns:
        Mean and standard deviation over the splits; from 1 to the number of classes.

    Raises:
        ValueError: for fewer rows than splits, values that are not finite, or as :func:`require_scores`.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    require_features("class scores", scores, rows=splits)
    require_scores(scores)
    count = len(scores)
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    found = []
    for i in range(splits):
        p = scores[order[i * count // splits : (i + 1) * count // splits]].astype(np.float64)
        p = np.exp(p - p.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        found.append(np.exp(_entropy(p.mean(0)) - _entropy(p).mean()))
    return MeanStd(float(np.mean(found)), float(np.std(found)))


def require_scores(scores: np.ndarray) -> None:
    """Raise ValueError for (n, classes) that are probabilities: no negative number, all rows of sum 1."""
    if (scores >= 0).all() and np.abs(scores.sum(1, dtype=np.float64) - 1).max() < 1e-3:
        raise ValueError("these class scores are probabilities, logits are needed: give their logarithms")


def _entropy(p: np.ndarray) -> np.ndarray:
    """- sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
