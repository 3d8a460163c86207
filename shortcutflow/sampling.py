"""Sampling: Euler steps of any sizes from noise to data (the paper's Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from shortcutflow.guidance import guided_velocity
from shortcutflow.path import check_state
from shortcutflow.schedule import step_sizes
from shortcutflow.types import Network


class Trajectory(NamedTuple):
    """The states a sampler went through: t (n + 1,) float32 and x_t (n + 1, b, *shape), noise first, data last."""

    t: Tensor
    x_t: Tensor


def draw_noise(
    shape: Sequence[int], *, generator: Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal noise (b, *shape), on the generator's device unless another is named."""
    if device is None and generator is not None:
        device = generator.device
    return torch.randn(tuple(shape), generator=generator, device=device)


@torch.no_grad()
def sample(
    net: Network,
    noise: Tensor | Sequence[int],
    y: Tensor | None = None,
    *,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    null_y: Tensor | float | None = None,
    finest_steps: int = 128,
    flow_only: bool = False,
    generator: Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Turn noise into data in any number of steps; one step costs one call of the network.

    >>> images = sample(net, noise, labels, steps=4)

    Args:
        net: any callable net(x_t, t, d, y); its train or eval mode is left as it is.
        noise: x_0, (b, *shape), the same for every budget; or that shape, to draw it from ``generator``.
        y: condition of each sample, (b, ...), or None.
        steps: a number of steps, or step sizes that add up to 1; see :func:`shortcutflow.schedule.step_sizes`.
        guidance_scale: s_null + scale (s_y - s_null); 1 is none, 0 the null condition alone.
        null_y: the null condition, for guidance.
        finest_steps: M of the training; finer steps follow the flow.
        flow_only: tell the network d = 0 at every step, for networks trained by flow matching.
        generator: where the noise comes from if only its shape is given.
        progress: show a progress bar.

    Returns:
        x_1, (b, *shape).

    Raises:
        ValueError: for steps below 1, step sizes that do not add up to 1, shapes that do not fit, or guidance without
            a condition or null_y.
    """
    x_t = noise if isinstance(noise, Tensor) else draw_noise(noise, generator=generator)
    for _, state in _walk(net, x_t, y, steps, guidance_scale, null_y, finest_steps, flow_only, progress):
        x_t = state
    return x_t


@torch.no_grad()
def trajectory(
    net: Network,
    noise: Tensor | Sequence[int],
    y: Tensor | None = None,
    *,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    null_y: Tensor | float | None = None,
    finest_steps: int = 128,
    flow_only: bool = False,
    generator: Generator | None = None,
    progress: bool = False,
) -> Trajectory:
    """As :func:`sample`, keeping every state from the noise to the sample."""
    x_t = noise if isinstance(noise, Tensor) else draw_noise(noise, generator=generator)
    times, states = [0.0], [x_t]
    for t, state in _walk(net, x_t, y, steps, guidance_scale, null_y, finest_steps, flow_only, progress):
        times.append(t)
        states.append(state)
    return Trajectory(torch.tensor(times, device=x_t.device), torch.stack(states))


def _walk(
    net: Network,
    x_t: Tensor,
    y: Tensor | None,
    steps: int | Sequence[float],
    guidance_scale: float,
    null_y: Tensor | float | None,
    finest_steps: int,
    flow_only: bool,
    progress: bool,
) -> Iterator[tuple[float, Tensor]]:
    """Yield (t, x_t) after each Euler step."""
    sizes = step_sizes(steps, finest_steps)
    b, device = len(x_t), x_t.device
    check_state(x_t, torch.empty(b), what="noise")
    if y is not None and len(y) != b:
        raise ValueError(f"y must have one row a sample: noise has {b}, y has {len(y)}")
    t = 0.0
    for i, size in enumerate(_with_progress(sizes, progress)):
        told = 0.0 if flow_only else size
        v = guided_velocity(
            net, x_t, torch.full((b,), t, device=device), torch.full((b,), told, device=device), y,
            scale=guidance_scale, null_y=null_y,
        )  # fmt: skip
        x_t = x_t + size * v.to(x_t.dtype)
        # Equal steps are counted, not added up, so that t is i/N to the last bit.
        t = (i + 1) * size if len(set(sizes)) == 1 else t + size
        yield min(t, 1.0), x_t


def _with_progress(sizes: list[float], progress: bool) -> Iterator[float]:
    if not progress:
        return iter(sizes)
    from tqdm import tqdm

    return iter(tqdm(sizes, desc="sampling", unit="step"))
