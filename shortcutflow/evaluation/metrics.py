"""The metrics by name, what each needs, and all of them of one set of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shortcutflow.evaluation.distances.frechet import frechet_between
from shortcutflow.evaluation.distances.inception_score import inception_score
from shortcutflow.evaluation.distances.kernel_distance import kernel_distance
from shortcutflow.evaluation.distances.manifold import manifold_metrics
from shortcutflow.evaluation.feature_set import FeatureSet
from shortcutflow.evaluation.reference import Reference
from shortcutflow.schedule import step_sizes

MANIFOLD = ("precision", "recall", "density", "coverage")
WITH_FEATURES = frozenset({"kid", *MANIFOLD})
"""Metrics that compare single images, not mean and covariance alone."""
WITH_REFERENCE = WITH_FEATURES | {"fid"}
METRICS = {
    "fid": "Fréchet distance between Gaussians fitted to the features; 0 is best",
    "kid": "kernel distance: unbiased squared MMD under (x.y/k + 1)^3, mean of 100 subsets of 1,000; 0 is best",
    "is": "Inception score: exp of the mean divergence of class probabilities, mean of 10 splits; more is better",
    "precision": "fraction of samples inside the real manifold, of 3 nearest neighbours; 1 is best",
    "recall": "fraction of real images inside the samples' manifold, of 3 nearest neighbours; 1 is best",
    "density": "how many real neighbourhoods, of 5 nearest, a sample lies in, relative to 5; about 1 is best",
    "coverage": "fraction of real neighbourhoods, of 5 nearest, that hold a sample; 1 is best",
    "label_accuracy": "fraction of samples whose label a classifier of real images reads; 1 is best",
}
"""What can be measured, described for the report."""

LEAST_SAMPLES = {"is": 10, **dict.fromkeys(MANIFOLD, 6)}
"""Of each metric that needs more than two: a sample a split, and more than its neighbours."""


def check_request(steps: Sequence[int], metrics: Sequence[str], samples: int) -> None:
    """Raise ValueError for unknown metrics, listing the known, too few samples, or numbers of steps that are none."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        problem = f"unknown metric {unknown[0]!r}" if unknown else "no metric is given"
        raise ValueError(f"{problem}; known: {', '.join(METRICS)}")
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    for name in metrics:
        if samples < (least := LEAST_SAMPLES.get(name, 0)):
            raise ValueError(f"metric {name!r} needs at least {least} samples, got {samples}")
    if not steps:
        raise ValueError("no number of steps is given: give some, such as 1 4 128")
    for count in steps:
        step_sizes(count)
    if len(set(steps)) < len(steps):
        raise ValueError(f"a number of steps is given twice: {', '.join(map(str, steps))}")


def compute_metrics(
    names: Sequence[str], made: FeatureSet, real: Reference | None, device: torch.device
) -> dict[str, float]:
    """The values by name; "kid" and "is" come with their standard deviation as "kid_std" and "is_std".

    Samples and reference hold what these metrics need; distances between all pairs are computed on the device.
    """
    values: dict[str, float] = {}
    if "is" in names:
        score = inception_score(made.logits)
        values |= {"is": score.mean, "is_std": score.std}
    if "label_accuracy" in names:
        values["label_accuracy"] = made.correct / made.done
    if real is not None and "fid" in names:
        values["fid"] = frechet_between(made.moments.statistics(), real.statistics)
    if real is not None and real.features is not None:
        if "kid" in names:
            distance = kernel_distance(real.features, made.features)
            values |= {"kid": distance.mean, "kid_std": distance.std}
        if any(name in MANIFOLD for name in names):
            values |= manifold_metrics(real.features, made.features, device=device)._asdict()
    # In the order of ``names``.
    return {key: values[key] for name in dict.fromkeys(names) for key in (name, f"{name}_std") if key in values}
