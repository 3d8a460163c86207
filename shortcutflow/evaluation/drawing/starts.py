"""What the samples of a picture start from: noise and labels, with what a person may ask for checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shortcutflow.data.source import DataInfo
from shortcutflow.evaluation.generate import labels_of, noise_of


class Starts(NamedTuple):
    """The noise x_0 (n, *shape) of some samples and their labels (n,) int64 or None."""

    noise: Tensor
    y: Tensor | None


def starts_of(
    info: DataInfo,
    *,
    labels: Sequence[int] | None = None,
    count: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Starts:
    """Noise and labels of the samples 0, 1, ... of a seed.

    Args:
        info: of the samples.
        labels: a label a sample; None takes ``count`` samples with all labels in turn.
        count: number of samples without labels; None is 10.
        seed: of the noise.
        device: of both.

    Raises:
        ValueError: for samples that are no pictures, labels out of range or where there are none, labels and count
            together, or a count below 1.
    """
    if not info.is_picture:
        raise ValueError(f"only pictures can be drawn: these samples have shape {info.shape}{_condition(info)}")
    if labels is not None and count is not None:
        raise ValueError("give labels or a count, not both: each label is one sample")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if labels is None:
        n = 10 if count is None else count
        return Starts(noise_of(seed, n, info.shape, device), labels_of(n, info.num_classes, device))
    check_labels(labels, info.num_classes)
    return Starts(noise_of(seed, len(labels), info.shape, device), torch.tensor(labels, device=device))


def pairs_of(
    info: DataInfo,
    *,
    labels: Sequence[int] | None = None,
    pairs: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Starts:
    """As :func:`starts_of`, two noises a label: pair i has the noise of the samples 2 i and 2 i + 1."""
    if pairs is not None and (pairs < 1 or labels is not None):
        raise ValueError(f"give labels or a number of pairs, at least 1; got {pairs} pairs and labels {labels}")
    first, y = starts_of(info, labels=labels, count=pairs, seed=seed, device=device)
    return Starts(noise_of(seed, 2 * len(first), info.shape, device), y)


def check_labels(labels: Sequence[int], num_classes: int | None) -> None:
    """Raise ValueError unless all labels are among the classes."""
    if num_classes is None:
        raise ValueError("this run was trained without labels: leave --labels out")
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {', '.join(map(str, wrong))}")


def _condition(info: DataInfo) -> str:
    return "" if info.condition_shape is None else f" and are conditioned on tensors of shape {info.condition_shape}"
