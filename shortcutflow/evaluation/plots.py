"""What plots of a network show: trajectories, reconstructions, interpolations and nearest neighbours in the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from shortcutflow import sampling
from shortcutflow.data.source import DataSource
from shortcutflow.evaluation.generate import fresh_noise_of
from shortcutflow.evaluation.sample_grid import image_grid, n_steps
from shortcutflow.guidance import guided_velocity
from shortcutflow.models.model import Model
from shortcutflow.path import expand_to, interpolate
from shortcutflow.schedule import levels_of

TRAJECTORY_TITLE = (
    "x_t: the states. flow: x_t + (1 - t) s(x_t, t, 0), the mean of the data that x_t may become. "
    "steps: x_1 by the fewest steps that training knows; equal images mean a self-consistent network."
)
RECONSTRUCTION_TITLE = (
    "x_t: real data with noise added. flow: x_t + (1 - t) s(x_t, t, 0). steps: one step of size d to t = 1. "
    "The last column is the data."
)
INTERPOLATION_TITLE = "From noise A to noise B: x_0 = cos(u pi/2) A + sin(u pi/2) B, with u above each column."
COMPARED = 64
"""Training samples, at least, whose own nearest neighbours are the measure for generated ones."""


@torch.no_grad()
def x1_predictions(
    model: Model, x_t: Tensor, t: Tensor, y: Tensor | None, *, guidance_scale: float = 1.0
) -> dict[str, Tensor]:
    """What the network predicts for x_1 from states at any times, by the flow and by steps that it was trained for.

    * ``"flow"``: x_t + (1 - t) s(x_t, t, 0), one evaluation: the mean of all data that x_t may become. Not for
      consistency models, which are trained for the step to t = 1 alone.
    * ``"steps"``: the fewest steps to t = 1, each of a dyadic size d and starting at a multiple of d as in training
      (section 3.2 of the paper): from t = 1/8 these are 1/8, 1/4 and 1/2, from 0, 1/2, 3/4, ... it is one. Consistency
      models and live reflow take one step from any t. Not for networks that were trained without step sizes.

    Args:
        model: the network.
        x_t: (r, *shape).
        t: (r,) float32; multiples of 1/M where "steps" are made of dyadic sizes.
        y: labels (r,) or None.
        guidance_scale: of classifier-free guidance.

    Returns:
        x_1 by name, each (r, *shape). Rows at t = 1 are x_t itself.

    Raises:
        ValueError: for a t that is not a multiple of 1/M.
    """

    def step(x_t: Tensor, t: Tensor, size: Tensor, d: Tensor) -> Tensor:
        """x_t + size s(x_t, t, d, y) where t < 1."""
        rows = t < 1
        labels, moved = None if y is None else y[rows], x_t.clone()
        v = guided_velocity(
            model.network, x_t[rows], t[rows], d[rows], labels, scale=guidance_scale, null_y=model.null_y
        )
        moved[rows] += expand_to(size[rows], v) * v.to(x_t.dtype)
        return moved

    predictions = {}
    if model.config.sampler != "consistency":
        predictions["flow"] = step(x_t, t, 1 - t, torch.zeros_like(t))
    if model.config.flow_only:
        return predictions
    if model.config.sampler != "euler":
        d = torch.ones_like(t) if model.config.sampler == "live_reflow" else 1 - t
        return predictions | {"steps": step(x_t, t, 1 - t, d)}
    while bool((t < 1).any()):
        d = _largest_steps(t, model.finest_steps)
        x_t, t = step(x_t, t, d, d), (t + d).clamp(max=1)
    return predictions | {"steps": x_t}


def _largest_steps(t: Tensor, finest_steps: int) -> Tensor:
    """The largest dyadic step size that divides each t; 1 for t = 0."""
    index = (t * finest_steps).round().long()
    if not torch.equal(index / finest_steps, t) or not 0 <= int(index.min()) <= int(index.max()) <= finest_steps:
        raise ValueError(
            f"t must be multiples of 1/{finest_steps} from 0 to 1, got {t.unique().tolist()}: training knows no steps "
            "from other times"
        )
    return torch.where(index == 0, finest_steps, index & -index) / finest_steps


def trajectory_rows(
    model: Model,
    noise: Tensor,
    y: Tensor | None,
    *,
    steps: int,
    columns: int = 9,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The states that the sampler goes through, and what the network predicts for x_1 from each.

    Args:
        model: the network.
        noise: (n, *shape).
        y: labels (n,) or None.
        steps: of the sampler.
        columns: at most so many of the steps + 1 states, evenly spaced, the first and the last among them.
        guidance_scale: of classifier-free guidance.
        seed: of the noise that consistency models add after their steps.

    Returns:
        t (c,), and by name "x_t" and the :func:`x1_predictions`, each (c, n, *shape).

    Raises:
        ValueError: for steps below 1 or finer than those of training, or fewer than two columns.
    """
    if columns < 2:
        raise ValueError(f"columns must be at least 2, the noise and the sample, got {columns}")
    if not model.config.flow_only and steps > model.finest_steps:
        raise ValueError(
            f"steps must be at most {model.finest_steps}, the finest of the training, got {steps}: from the states "
            "between, the network knows no step"
        )
    states = path_states(model, noise, y, steps=steps, columns=columns, guidance_scale=guidance_scale, seed=seed)
    return states.t, _rows(model, states.x_t, states.t, y, guidance_scale)


def path_states(
    model: Model,
    noise: Tensor,
    y: Tensor | None,
    *,
    steps: int,
    columns: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> sampling.Trajectory:
    """The states that the sampler goes through, at most so many, evenly spaced, the first and the last among them.

    For the arguments see :func:`trajectory_rows`; any number of steps goes.
    """
    states = sampling.trajectory(
        model.network, noise, y, steps=steps, guidance_scale=guidance_scale,
        fresh_noise=fresh_noise_of(seed, range(len(noise)), noise), **model.sampler_options(),
    )  # fmt: skip
    kept = np.linspace(0, steps, min(columns, steps + 1)).round().astype(int).tolist()
    return sampling.Trajectory(states.t[kept], states.x_t[kept])


def reconstruction_rows(
    model: Model,
    data: Tensor,
    noise: Tensor,
    y: Tensor | None,
    *,
    columns: int | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Real data with noise added, sent to t = 1 from t = 0, 1/2, 3/4, ... 1 - 1/M by two evaluations.

    The authors' code logs these images as "reconstruction_shortcut" and "reconstruction_flow".

    Args:
        model: the network.
        data, noise: (n, *shape).
        y: labels of the data (n,) or None.
        columns: at most so many of these times, evenly spaced, the first and the last among them; None is all.
        guidance_scale: of classifier-free guidance.

    Returns:
        As :func:`trajectory_rows`; the last column is the data, at t = 1.
    """
    levels = levels_of(model.finest_steps)
    chosen = np.linspace(0, levels, min(columns or levels + 1, levels + 1)).round()
    t = torch.tensor([*(1 - 2.0**-level for level in chosen), 1.0], dtype=torch.float32, device=data.device)
    every = (len(t), *data.shape)
    x_t = interpolate(
        noise.expand(every).flatten(0, 1), data.expand(every).flatten(0, 1), t.repeat_interleave(len(data))
    )
    return t, _rows(model, x_t.unflatten(0, every[:2]), t, y, guidance_scale)


def _rows(model: Model, x_t: Tensor, t: Tensor, y: Tensor | None, guidance_scale: float) -> dict[str, Tensor]:
    """States (c, n, *shape) at times (c,), and the predictions from them."""
    c, n = x_t.shape[:2]
    flat = x1_predictions(
        model, x_t.flatten(0, 1), t.repeat_interleave(n), None if y is None else y.repeat(c),
        guidance_scale=guidance_scale,
    )  # fmt: skip
    return {"x_t": x_t} | {name: x_1.unflatten(0, (c, n)) for name, x_1 in flat.items()}


def x1_image(
    t: Tensor, rows: Mapping[str, Tensor], y: Tensor | None, *, title: str, with_step_size: bool = False
) -> np.ndarray:
    """Draw :func:`trajectory_rows` or :func:`reconstruction_rows` as images, (height, width, 3) uint8.

    Args:
        t: (c,), a column each.
        rows: images (c, n, channels, h, w) by name; each sample has a row of each.
        y: labels (n,) or None.
        title: above all.
        with_step_size: write the step size to t = 1 below each time.
    """
    n = next(iter(rows.values())).shape[1]
    columns = [f"t = {_fraction(time)}" for time in t.tolist()]
    if with_step_size:
        columns = [f"{text}\nd = {_fraction(1 - time)}" for text, time in zip(columns[:-1], t.tolist(), strict=False)]
        columns.append("t = 1\ndata")
    titles = [f"{label}  {name}".strip() if name == "x_t" else name for label in _names(y, n) for name in rows]
    images = [row[:, i] for i in range(n) for row in rows.values()]
    return image_grid(images, titles, column_titles=columns, title=title, group=len(rows), cell=64)


def mixed_noise(a: Tensor, b: Tensor, u: float) -> Tensor:
    """The noise cos(u pi/2) a + sin(u pi/2) b, for u in [0, 1].

    If a and b are independent standard normal, so is it. u = 0 is a and u = 1 is b, to the bit.
    """
    if u in (0, 1):
        return a if u == 0 else b
    return math.cos(math.pi / 2 * u) * a + math.sin(math.pi / 2 * u) * b


def interpolate_noise(a: Tensor, b: Tensor, columns: int) -> Tensor:
    """:func:`mixed_noise` for evenly spaced u in [0, 1], (columns, *a.shape).

    Raises:
        ValueError: for fewer than two columns.
    """
    if columns < 2:
        raise ValueError(f"columns must be at least 2, the two ends, got {columns}")
    return torch.stack([mixed_noise(a, b, i / (columns - 1)) for i in range(columns)])


def interpolated_samples(
    model: Model,
    noise: Tensor,
    y: Tensor | None,
    *,
    columns: int = 9,
    steps: int = 1,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Samples from :func:`interpolate_noise` between pairs of noises, (pairs, columns, *shape).

    Args:
        model: the network.
        noise: (2 pairs, *shape); rows 2 i and 2 i + 1 are the ends of pair i.
        y: labels (pairs,) or None.
        columns: samples of a pair, with both ends.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        seed: of the noise that consistency models add after their steps, the same along a pair.
    """
    start = interpolate_noise(noise[0::2], noise[1::2], columns).transpose(0, 1)
    pairs, flat = len(start), start.flatten(0, 1)
    index = [2 * pair for pair in range(pairs) for _ in range(columns)]
    samples = sampling.sample(
        model.network, flat, None if y is None else y.repeat_interleave(columns), steps=steps,
        guidance_scale=guidance_scale, fresh_noise=fresh_noise_of(seed, index, flat), **model.sampler_options(),
    )  # fmt: skip
    return samples.unflatten(0, (pairs, columns))


def interpolation_image(by_steps: Mapping[int, Tensor], y: Tensor | None) -> np.ndarray:
    """Draw :func:`interpolated_samples` by number of steps, (height, width, 3) uint8: a row for each pair and number.

    Args:
        by_steps: images (pairs, columns, channels, h, w).
        y: labels (pairs,) or None.
    """
    pairs, columns = next(iter(by_steps.values())).shape[:2]
    between = [_fraction(i / (columns - 1)) for i in range(1, columns - 1)]
    return image_grid(
        [samples[i] for i in range(pairs) for samples in by_steps.values()],
        [f"{label}  {n_steps(steps)}".strip() for label in _names(y, pairs) for steps in by_steps],
        column_titles=["A", *between, "B"], title=INTERPOLATION_TITLE, group=len(by_steps) if len(by_steps) > 1 else 0,
        cell=64,
    )  # fmt: skip


def nearest_neighbours(
    queries: Tensor, blocks: Iterable[Tensor], k: int, *, exclude_itself: bool = False
) -> tuple[Tensor, Tensor]:
    """The k nearest of all samples in some blocks to each query; exact, holding one block at a time.

    Args:
        queries: (q, *shape) on the CPU.
        blocks: (b, *shape) each.
        k: how many.
        exclude_itself: query i is sample i of the blocks and not a neighbour of its own.

    Returns:
        Root mean square differences of one value (q, k), nearest first: 0 for a copy, at most 2 for images. And the
        neighbours' positions in the blocks, (q, k) int64.

    Raises:
        ValueError: for k below 1, samples of another shape, or fewer samples than neighbours.
    """
    if k < 1:
        raise ValueError(f"nearest must be at least 1, got {k}")
    q, shape, start = len(queries), queries.shape[1:], 0
    distance, position = torch.empty(q, 0), torch.empty(q, 0, dtype=torch.long)
    for block in blocks:
        if block.shape[1:] != shape:
            raise ValueError(f"samples have shape {tuple(shape)}, the data {tuple(block.shape[1:])}")
        # By differences, not by products: the distance of a copy is then 0 and not the root of a rounding error.
        new = torch.cdist(queries.flatten(1), block.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        places = torch.arange(start, start + len(block))
        if exclude_itself:
            new[places == torch.arange(q)[:, None]] = torch.inf
        distance = torch.cat([distance, new / math.sqrt(shape.numel())], dim=1)
        distance, kept = distance.topk(min(k, distance.shape[1]), largest=False)
        position = torch.cat([position, places.expand(q, -1)], dim=1).gather(1, kept)
        start += len(block)
    if start - exclude_itself < k:
        raise ValueError(f"nearest is {k}, but there are only {start - exclude_itself} samples to choose from")
    return distance, position


def neighbours_in_data(source: DataSource, samples: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The nearest training samples of generated ones, and how near training samples are to each other.

    Args:
        source: of the data, which is read twice.
        samples: (n, *shape).
        k: how many neighbours.

    Returns:
        Distances (n, k) as of :func:`nearest_neighbours`, the neighbours (n, k, *shape), and the mean distance of
        training samples to the nearest other one.
    """
    distance, position = nearest_neighbours(samples.float().cpu(), (batch.data for batch in source.one_epoch()), k)
    one_by_one = source.as_stored().open_stream(batch_size=1, seed=0)
    found = torch.cat([one_by_one.batch_at(int(place)).data for place in position.flatten()])
    some = next(source.one_epoch(batch_size=max(COMPARED, len(samples)))).data
    among, _ = nearest_neighbours(some, (batch.data for batch in source.one_epoch()), 1, exclude_itself=True)
    return distance, found.unflatten(0, (len(samples), k)), float(among.mean())


def neighbours_image(images: Tensor, distance: Tensor, y: Tensor | None, *, title: str) -> np.ndarray:
    """Draw samples and their neighbours, with the distance to the nearest, (height, width, 3) uint8.

    Args:
        images: (n, 1 + k, channels, h, w), each sample before its neighbours.
        distance: (n, k).
        y: labels (n,) or None.
        title: above all.
    """
    n, k = distance.shape
    titles = [f"{label}\n{nearest:.3f}".strip() for label, nearest in zip(_names(y, n), distance[:, 0], strict=True)]
    columns = ["sample", *(f"no. {i + 1}" for i in range(k))]
    return image_grid(list(images), titles, column_titles=columns, title=title, cell=64)


def _names(y: Tensor | None, n: int) -> Sequence[str]:
    return [""] * n if y is None else [f"label {label}" for label in y.tolist()]


def _fraction(value: float) -> str:
    """A time or step size as a fraction: 0.125 is 1/8."""
    return str(Fraction(value).limit_denominator(4096))
