"""Samples from a network: sample i depends on (seed, i) alone, never on the batch it came in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shortcutflow.data.source import DataInfo
from shortcutflow.models.model import Model
from shortcutflow.sampling import FreshNoise, sample
from shortcutflow.seeds import seed_for


def noise_of(seed: int, samples: int | range, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """The noise of some samples, or of so many from 0 on, (n, *shape), drawn on the CPU: every device gets the same."""
    samples = range(samples) if isinstance(samples, int) else samples
    return _draws(seed, "noise", samples, shape).to(device)


def fresh_noise_of(seed: int, samples: Sequence[int], like: Tensor) -> FreshNoise:
    """What the sampler "consistency" adds after its steps to rows of these samples, like the noise (n, *shape)."""
    return lambda step: _draws(seed, "fresh_noise", samples, like.shape[1:], index=step).to(like)


def _draws(seed: int, purpose: str, samples: Sequence[int], shape: tuple[int, ...], *, index: int = 0) -> Tensor:
    """Normal numbers for each sample by itself, (len(samples), *shape), on the CPU."""
    draws = torch.empty((len(samples), *shape))
    generator = torch.Generator()  # one for all: making it costs as much as the numbers of a small image
    for row, i in zip(draws, samples, strict=True):
        torch.randn(shape, generator=generator.manual_seed(seed_for(seed, purpose, step=i, index=index)), out=row)
    return draws


def labels_of(samples: int | range, num_classes: int | None, device: torch.device | str = "cpu") -> Tensor | None:
    """Labels in turn, sample i has i mod num_classes, (n,) int64; None if there are none."""
    if num_classes is None:
        return None
    numbers = range(samples) if isinstance(samples, int) else samples
    return torch.tensor(numbers, dtype=torch.int64, device=device) % num_classes


def initial_noise(
    model: Model,
    *,
    labels: Sequence[int] | None = None,
    count: int | None = None,
    default: int = 10,
    noises_per_label: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Noise and labels of the samples 0, 1, ... of a seed that a plot begins with, on the network's device.

    Args:
        model: whose samples.
        labels: one for each sample; None takes ``count`` samples, or ``default``, with all labels in turn.
        noises_per_label: label i belongs to so many consecutive noises.

    Returns:
        x_0 (noises_per_label n, *shape), and y (n,) int64 or None.

    Raises:
        ValueError: for samples that are not images, labels out of range or of a network without labels, labels and a
            count together, or a count below 1.
    """
    require_images(model.info)
    if labels is not None and count is not None:
        raise ValueError("give either labels or a count: each label is one sample")
    if count is not None and count < 1:
        raise ValueError(f"the number of samples must be at least 1, got {count}")
    if labels is None:
        n = count or default
        y = labels_of(n, model.num_classes, model.device)
    else:
        check_labels(labels, model.num_classes)
        y, n = torch.tensor(labels, device=model.device), len(labels)
    return noise_of(seed, noises_per_label * n, model.shape, model.device), y


def require_images(info: DataInfo) -> None:
    """Raise ValueError unless samples are images that take no more than labels."""
    if not info.is_picture:
        condition = f", conditioned on tensors of shape {info.condition_shape}" if info.condition_shape else ""
        raise ValueError(f"only images can be drawn: these samples have shape {info.shape}{condition}")


def check_labels(labels: Sequence[int], num_classes: int | None) -> None:
    """Raise ValueError unless all labels are classes of the network."""
    if num_classes is None:
        raise ValueError("this network was trained without labels: leave --labels out")
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {', '.join(map(str, wrong))}")


@torch.no_grad()
def generate(
    model: Model,
    noise: Tensor,
    y: Tensor | None,
    *,
    steps: int,
    batch_size: int = 500,
    guidance_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """As :func:`shortcutflow.sample`, in batches: (n, *shape) from noise (n, *shape).

    ``seed`` is that of the noise which the sampler "consistency" adds after its steps; sample i gets its own,
    counted from ``first``, the number of the first sample here.
    """
    numbers, made = range(first, first + len(noise)), []
    for start in range(0, len(noise), batch_size):
        part = slice(start, start + batch_size)
        made.append(
            sample(
                model.network, noise[part], None if y is None else y[part],
                steps=steps, guidance_scale=guidance_scale,
                fresh_noise=fresh_noise_of(seed, numbers[part], noise[part]), **model.sampler_options(),
            )
        )  # fmt: skip
    return torch.cat(made)
