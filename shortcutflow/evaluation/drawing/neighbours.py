"""The training samples nearest to generated ones: a check against memorising."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shortcutflow.data.source import DataSettings
from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.drawing.ends import names_of
from shortcutflow.evaluation.drawing.grids import sample_grid
from shortcutflow.evaluation.drawing.real import all_data

COMPARED = 64
"""Real samples whose own nearest neighbours are the measure, unless more samples are looked at."""


class Neighbours(NamedTuple):
    """For each of q samples its k nearest of the data, nearest first.

    Attributes:
        distance: (q, k) float32, the root mean square difference of a number: 0 for a copy, at most 2 for pictures.
        data: (q, k, *shape).
    """

    distance: Tensor
    data: Tensor


def nearest_of(queries: Tensor, blocks: Iterable[Tensor], nearest: int, *, left_out: Sequence[int] = ()) -> Neighbours:
    """The nearest of all blocks to each query: exact, and only ``nearest`` samples a query are kept between blocks.

    Args:
        queries: (q, *shape) on the CPU.
        blocks: (b, *shape) each.
        nearest: how many, k.
        left_out: for each query the position of one sample that is not taken, counted over all blocks: the query
            itself, where it is one of the data. Empty if all are taken.

    Raises:
        ValueError: for fewer than one neighbour, samples of another shape, or less data than neighbours.
    """
    if nearest < 1:
        raise ValueError(f"nearest must be at least 1, got {nearest}")
    q, shape = len(queries), queries.shape[1:]
    flat = queries.flatten(1).float()
    best = Neighbours(torch.empty(q, 0), torch.empty(q, 0, *shape))
    start = 0
    for block in blocks:
        if block.shape[1:] != shape:
            raise ValueError(f"samples have shape {tuple(shape)}, the data {tuple(block.shape[1:])}")
        # By differences, not by products: the distance of a copy is then 0 and not the root of a rounding error.
        distance = torch.cdist(flat, block.flatten(1).float(), compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance / flat.shape[1] ** 0.5
        for i, position in enumerate(left_out):
            if start <= position < start + len(block):
                distance[i, position - start] = torch.inf
        best = _merged(best, distance, block.float(), nearest)
        start += len(block)
    if best.distance.shape[1] < nearest or not best.distance.isfinite().all():
        raise ValueError(f"nearest is {nearest}, but there are only {start - bool(left_out)} samples to choose from")
    return best


def _merged(best: Neighbours, distance: Tensor, block: Tensor, nearest: int) -> Neighbours:
    """The nearest of what was found before and of a block with its distances (q, b)."""
    closest = distance.topk(min(nearest, len(block)), largest=False)
    both = torch.cat([best.distance, closest.values], dim=1)
    data = torch.cat([best.data, block[closest.indices]], dim=1)
    kept = both.topk(min(nearest, both.shape[1]), largest=False)
    rows = torch.arange(len(both))[:, None]
    return Neighbours(kept.values, data[rows, kept.indices])


def neighbours_in(settings: DataSettings, samples: Tensor, nearest: int) -> tuple[Neighbours, float]:
    """The samples' neighbours in a data set, and the mean distance of real samples to their nearest other one.

    The data is read once for the samples and once for the real ones.

    Args:
        settings: of the data.
        samples: (n, *shape).
        nearest: how many neighbours.
    """
    samples = samples.float().cpu()
    found = nearest_of(samples, (block.data for block in all_data(settings)), nearest)
    real = next(all_data(settings, block=max(COMPARED, len(samples)))).data
    among_real = nearest_of(real, (block.data for block in all_data(settings)), 1, left_out=range(len(real)))
    return found, float(among_real.distance.mean())


def neighbours_picture(
    samples: Tensor, found: Neighbours, real_distance: float, y: Tensor | None, decoder: ImageDecoder
) -> np.ndarray:
    """Draw each sample and its nearest neighbours with their distances, (height, width, 3) uint8.

    Args:
        samples: (n, *shape).
        found: their neighbours.
        real_distance: mean distance of real samples to the nearest other one.
        y: labels of the samples or None.
        decoder: of the samples.
    """
    images = torch.cat([samples.float().cpu()[:, None], found.data], dim=1)
    rows = list(decoder(images)[0])
    captions = [["", *(f"{distance:.3f}" for distance in row)] for row in found.distance.tolist()]
    columns = ["sample", *(f"no. {i + 1}" for i in range(found.distance.shape[1]))]
    return sample_grid(
        rows, names_of(y, len(samples)), cell=64, columns=columns, captions=captions, title=said(found, real_distance)
    )


def said(found: Neighbours, real_distance: float) -> str:
    """The distances as a sentence for people."""
    own = float(found.distance[:, 0].mean())
    return (
        f"Mean distance to the nearest of the data: these samples {own:.3f}, real ones to others {real_distance:.3f}."
    )
