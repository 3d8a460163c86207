"""What plots of a network show: trajectories, reconstructions, interpolations and nearest neighbours in the data.

Throughout, states and noise are (n, *shape), y holds labels (n,) or is None, ``guidance_scale`` is that of
classifier-free guidance, and ``seed`` that of the noise which consistency models add after their steps.
"""

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
    """The states that the sampler goes through, see :func:`path_states`, and what is predicted for x_1 from each.

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
    """The states that the sampler goes through in so many steps, at most ``columns`` of the steps + 1, evenly spaced.

    The first and the last are among them.
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

    At most ``columns`` of these times are shown, evenly spaced, the first and the last among them; None is all.

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


def labelled_grid(
    images: Mapping[str, Tensor], labels: Sequence[str], *, column_titles: Sequence[str], title: str
) -> np.ndarray:
    """Draw images (n, columns, channels, h, w) by name, (height, width, 3) uint8: a sample has a row of each name."""
    titles = [f"{label if i == 0 else ''}  {name}".strip() for label in labels for i, name in enumerate(images)]
    rows = [images_of[i] for i in range(len(labels)) for images_of in images.values()]
    group = len(images) if len(images) > 1 else 0
    return image_grid(rows, titles, column_titles=column_titles, title=title, group=group, cell=64)


def label_names(y: Tensor | None, n: int) -> list[str]:
    """What to write before each sample."""
    return [""] * n if y is None else [f"label {label}" for label in y.tolist()]


def x1_image(
    t: Tensor, rows: Mapping[str, Tensor], y: Tensor | None, *, title: str, with_step_size: bool = False
) -> np.ndarray:
    """Draw :func:`trajectory_rows` or :func:`reconstruction_rows` as images, with the step size to t = 1 or without.

    The rows are images (c, n, channels, h, w) by name, a column for each t (c,), and each sample has a row of each.
    """
    columns = [f"t = {_fraction(time)}" for time in t.tolist()]
    if with_step_size:
        columns = [f"{text}\nd = {_fraction(1 - time)}" for text, time in zip(columns[:-1], t.tolist(), strict=False)]
        columns.append("t = 1\ndata")
    images = {name: row.transpose(0, 1) for name, row in rows.items()}
    labels = label_names(y, len(next(iter(images.values()))))
    return labelled_grid(images, labels, column_titles=columns, title=title)


def mixed_noise(a: Tensor, b: Tensor, u: float) -> Tensor:
    """The noise cos(u pi/2) a + sin(u pi/2) b, for u in [0, 1].

    If a and b are independent standard normal, so is it. u = 0 is a and u = 1 is b, to the bit.
    """
    if u in (0, 1):
        return a if u == 0 else b
    return math.cos(math.pi / 2 * u) * a + math.sin(math.pi / 2 * u) * b


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
    """Samples from :func:`mixed_noise` of pairs of noises for evenly spaced u from 0 to 1, (pairs, columns, *shape).

    Args:
        model: the network.
        noise: (2 pairs, *shape); rows 2 i and 2 i + 1 are the ends of pair i.
        y: labels (pairs,) or None.
        columns: samples of a pair, with both ends.
        steps, guidance_scale, seed: of the sampler.

    Raises:
        ValueError: for fewer than two columns.
    """
    if columns < 2:
        raise ValueError(f"columns must be at least 2, the two ends, got {columns}")
    start = torch.stack([mixed_noise(noise[0::2], noise[1::2], i / (columns - 1)) for i in range(columns)], dim=1)
    pairs, flat = len(start), start.flatten(0, 1)
    index = [2 * pair for pair in range(pairs) for _ in range(columns)]
    samples = sampling.sample(
        model.network, flat, None if y is None else y.repeat_interleave(columns), steps=steps,
        guidance_scale=guidance_scale, fresh_noise=fresh_noise_of(seed, index, flat), **model.sampler_options(),
    )  # fmt: skip
    return samples.unflatten(0, (pairs, columns))


def interpolation_image(by_steps: Mapping[int, Tensor], y: Tensor | None) -> np.ndarray:
    """Draw :func:`interpolated_samples` by number of steps as images, a row for each pair and number."""
    pairs, columns = next(iter(by_steps.values())).shape[:2]
    titles = ["A", *(_fraction(i / (columns - 1)) for i in range(1, columns - 1)), "B"]
    images = {n_steps(steps): samples for steps, samples in by_steps.items()}
    return labelled_grid(images, label_names(y, pairs), column_titles=titles, title=INTERPOLATION_TITLE)


def nearest_neighbours(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of all samples in some blocks to each query; exact, holding one block at a time.

    Args:
        queries: (q, *shape) on the CPU.
        blocks: (b, *shape) each.
        k: how many.

    Returns:
        Root mean square differences of one value (q, k), nearest first: 0 for a copy, at most 2 for images. And the
        neighbours' positions in the blocks, (q, k) int64.

    Raises:
        ValueError: for k below 1, samples of another shape, or fewer samples than neighbours.
    """
    if k < 1:
        raise ValueError(f"nearest must be at least 1, got {k}")
    shape, start = queries.shape[1:], 0
    distance, position = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for block in blocks:
        if block.shape[1:] != shape:
            raise ValueError(f"samples have shape {tuple(shape)}, the data {tuple(block.shape[1:])}")
        # By differences, not by products: the distance of a copy is then 0 and not the root of a rounding error.
        new = torch.cdist(queries.flatten(1), block.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        places = torch.arange(start, start + len(block)).expand(len(queries), -1)
        distance = torch.cat([distance, new / math.sqrt(shape.numel())], dim=1)
        distance, kept = distance.topk(min(k, distance.shape[1]), largest=False)
        position = torch.cat([position, places], dim=1).gather(1, kept)
        start += len(block)
    if start < k:
        raise ValueError(f"nearest is {k}, but there are only {start} samples to choose from")
    return distance, position


def neighbours_in_data(source: DataSource, samples: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The k nearest training samples of generated ones (n, *shape), and how near training samples are to each other.

    Returns:
        Distances (n, k) as of :func:`nearest_neighbours`, the neighbours (n, k, *shape), and the mean distance of
        training samples to the nearest other one.
    """
    distance, position = nearest_neighbours(samples.float().cpu(), (batch.data for batch in source.one_epoch()), k)
    one_by_one = source.as_stored().open_stream(batch_size=1, seed=0)
    found = torch.cat([one_by_one.batch_at(int(place)).data for place in position.flatten()])
    some = next(source.one_epoch(batch_size=max(COMPARED, len(samples)))).data
    # The nearest of a training sample is itself.
    among, _ = nearest_neighbours(some, (batch.data for batch in source.one_epoch()), 2)
    return distance, found.unflatten(0, (len(samples), k)), float(among[:, 1].mean())


def neighbours_image(images: Tensor, distance: Tensor, y: Tensor | None, *, title: str) -> np.ndarray:
    """Draw images (n, 1 + k, channels, h, w), each sample before its neighbours, with the distances (n, k) to them."""
    n, k = distance.shape
    nearest = [f"{near:.3f}" for near in distance[:, 0].tolist()]
    labels = [f"{label}\n{near}".strip() for label, near in zip(label_names(y, n), nearest, strict=True)]
    columns = ["sample", *(f"no. {i + 1}" for i in range(k))]
    return labelled_grid({"": images}, labels, column_titles=columns, title=title)


def _fraction(value: float) -> str:
    """A time or step size as a fraction: 0.125 is 1/8."""
    return str(Fraction(value).limit_denominator(4096))
