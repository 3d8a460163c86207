"""The numbers by name, what each needs, and all of them of one set of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from shortcutflow.evaluation.distances.frechet import frechet_between
from shortcutflow.evaluation.distances.inception_score import inception_score
from shortcutflow.evaluation.distances.kernel_distance import kernel_distance
from shortcutflow.evaluation.distances.manifold import manifold_metrics
from shortcutflow.evaluation.distances.statistics import Statistics
from shortcutflow.evaluation.parts_on_disk import Merged

Found = TypeVar("Found")
MANIFOLD = ("precision", "recall", "density", "coverage")
WITH_FEATURES = ("kid", *MANIFOLD)
WITH_REFERENCE = ("fid", *WITH_FEATURES)
METRICS = {
    "fid": "Fréchet distance between Gaussians fitted to the features; 0 is best",
    "kid": "kernel distance: unbiased squared MMD under (x.y/k + 1)^3, mean of 100 subsets of 1,000; 0 is best",
    "is": "Inception score: exp of the mean divergence of class probabilities, mean of 10 splits; more is better",
    "precision": "share of samples inside the real manifold, of 3 nearest neighbours; 1 is best",
    "recall": "share of real images inside the samples' manifold, of 3 nearest neighbours; 1 is best",
    "density": "how many real neighbourhoods, of 5 nearest, a sample lies in, relative to 5; about 1 is best",
    "coverage": "share of real neighbourhoods, of 5 nearest, that hold a sample; 1 is best",
}
"""What there is to measure, in words for the report."""

LEAST_SAMPLES = {"is": 10, **dict.fromkeys(MANIFOLD, 6)}
"""Of each metric that needs more than two: a sample a split, and more than its neighbours."""

MOST_ROWS = 50_000
"""Features of real pictures that are kept, and used for what compares single features."""


class Real(NamedTuple):
    """The features of real pictures: their statistics, and themselves or None."""

    statistics: Statistics
    features: np.ndarray | None


def check_metrics(names: Sequence[str], samples: int) -> None:
    """Refuse names that do not exist, and too few samples.

    Raises:
        ValueError: listing the names there are, or naming the metric that needs more samples.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        told = f"unknown metric {unknown[0]!r}" if unknown else "no metric is asked for"
        raise ValueError(f"{told}; known: {', '.join(METRICS)}")
    needing_most = max(names, key=lambda name: LEAST_SAMPLES.get(name, 2))
    if samples < (least := LEAST_SAMPLES.get(needing_most, 2)):
        raise ValueError(f"metric {needing_most!r} needs at least {least} samples, got {samples}")


def needs_reference(names: Sequence[str]) -> bool:
    """Whether anything real is needed."""
    return any(name in WITH_REFERENCE for name in names)


def needs_features(names: Sequence[str]) -> bool:
    """Whether statistics of the real pictures and of the samples are not enough."""
    return any(name in WITH_FEATURES for name in names)


def measured(
    names: Sequence[str], made: Merged, real: Real | None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The values by name; "kid" and "is" come with their standard deviation as "kid_std" and "is_std".

    Args:
        names: of metrics.
        made: features of the samples.
        real: of real pictures; None if no metric needs them.
        device: where distances between all pairs are made.

    Raises:
        ValueError: if something a metric needs is missing, naming the metric.
    """
    values: dict[str, float] = {}
    if "is" in names:
        score = inception_score(_there(made.logits, "is", "class scores of the samples"))
        values |= {"is": score.mean, "is_std": score.std}
    if "fid" in names:
        values["fid"] = frechet_between(made.statistics, _there(real, "fid", "a reference").statistics)
    for name in names:
        if name in WITH_FEATURES and name not in values:
            theirs = _there(_there(real, name, "a reference").features, name, "features of the reference")
            ours = _there(made.features, name, "features of the samples")
            values |= _of_features(name, names, theirs, ours, device)
    # In the order in which they were asked for, whatever was measured together.
    return {key: values[key] for name in dict.fromkeys(names) for key in (name, f"{name}_std") if key in values}


def _of_features(
    name: str, names: Sequence[str], real: np.ndarray, made: np.ndarray, device: torch.device | str
) -> dict[str, float]:
    if name == "kid":
        distance = kernel_distance(real, made)
        return {"kid": distance.mean, "kid_std": distance.std}
    found = manifold_metrics(real, made, device=device)
    return {each: getattr(found, each) for each in MANIFOLD if each in names}


def _there(what: Found | None, metric: str, words: str) -> Found:
    if what is None:
        raise ValueError(f"metric {metric!r} needs {words}, which are not there")
    return what
