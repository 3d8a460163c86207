"""Sampling: steps of any sizes from noise to data (the paper's Algorithm 2), baselines' samplers, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Generator, Tensor

from shortcutflow.conditions import Condition, NullCondition, as_condition, check_rows
from shortcutflow.guidance import guided_velocity
from shortcutflow.inputs import as_state, home_of
from shortcutflow.path import check_state
from shortcutflow.schedule import step_sizes
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import Network, SamplerKind

FreshNoise = Callable[[int], Tensor]
"""Noise (b, *shape) to add after step i, counted from 0."""


class Trajectory(NamedTuple):
    """The states a sampler went through: t (n + 1,) float32 and x_t (n + 1, b, *shape), noise first, data last."""

    t: Tensor
    x_t: Tensor


def draw_noise(
    shape: Sequence[int], *, generator: Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal noise (b, *shape), float32.

    Args:
        shape: with the number of samples in front.
        generator: one on the CPU gives the same noise whatever the device; generators of other devices differ from it.
            None is seeded from torch's default generator, which ``torch.manual_seed`` seeds.
        device: None is the generator's, or the default device.
    """
    if device is None:
        device = generator.device if generator is not None else torch.get_default_device()
    generator = generator_or_default(generator, device)
    return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)


@torch.no_grad()
def sample(
    net: Network,
    noise: Tensor | Sequence[int],
    y: Condition = None,
    *,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    null_y: NullCondition = None,
    finest_steps: int = 128,
    flow_only: bool = False,
    sampler: SamplerKind = "euler",
    fresh_noise: FreshNoise | None = None,
    generator: Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Turn noise into data in any number of steps; one step costs one call of the network.

    >>> images = sample(net, noise, labels, steps=4)

    Args:
        net: any callable net(x_t, t, d, y); its train or eval mode is left as it is.
        noise: x_0, (b, *shape), the same for every number of steps, converted to the precision of a float32 network; or
            that shape, to draw it on the network's device: see :func:`draw_noise`.
        y: labels (b,) as a tensor, array or list of whole numbers, or any condition; see
            :mod:`shortcutflow.conditions`.
        steps: a number of steps, or step sizes that add up to 1; see :func:`shortcutflow.schedule.step_sizes`.
        guidance_scale: s_null + scale (s_y - s_null); 1 is none, 0 the null condition alone.
        null_y: the null condition, for guidance.
        finest_steps: M of the training; finer steps follow the flow, which the network knows as d = 1/M.
        flow_only: give the network d = 0 at every step, for networks trained by flow matching.
        sampler: how a step is made and which step size d_cond the network is given:

            * "euler": x_{t+d} = x_t + d s, d_cond = d, at least 1/M;
            * "consistency": jump to the end x_t + (1 - t) s, d_cond = 1 - t, and go back to t + d by adding noise;
            * "live_reflow": as "euler", but d_cond = 1, which stands for the straightened flow, if there are fewer than
              M steps.
        fresh_noise: noise for "consistency" to add after each step but the last; None draws it from ``generator``.
        generator: where the noise comes from if only its shape is given, and fresh noise; on any device.
        progress: show a progress bar.

    Returns:
        x_1, (b, *shape).

    Raises:
        ValueError: for steps below 1, step sizes that do not add up to 1, shapes that do not fit, or guidance without
            a condition or null_y, or fresh noise that is needed and comes from nowhere.
    """
    x_t = _start(net, noise, generator)
    guided = _Guided(net, as_condition(y, x_t.device), guidance_scale, null_y, finest_steps, flow_only, sampler)
    for _, state in _walk(guided, x_t, steps, fresh_noise, generator, progress):
        x_t = state
    return x_t


@torch.no_grad()
def trajectory(
    net: Network,
    noise: Tensor | Sequence[int],
    y: Condition = None,
    *,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    null_y: NullCondition = None,
    finest_steps: int = 128,
    flow_only: bool = False,
    sampler: SamplerKind = "euler",
    fresh_noise: FreshNoise | None = None,
    generator: Generator | None = None,
    progress: bool = False,
) -> Trajectory:
    """As :func:`sample`, keeping every state from the noise to the sample."""
    x_t = _start(net, noise, generator)
    times, states = [0.0], [x_t]
    guided = _Guided(net, as_condition(y, x_t.device), guidance_scale, null_y, finest_steps, flow_only, sampler)
    for t, state in _walk(guided, x_t, steps, fresh_noise, generator, progress):
        times.append(t)
        states.append(state)
    # Copied without a wait for the device.
    return Trajectory(torch.tensor(times).to(x_t.device, non_blocking=True), torch.stack(states))


@torch.no_grad()
def invert(
    net: Network,
    data: Tensor,
    y: Condition = None,
    *,
    steps: int = 128,
    guidance_scale: float = 1.0,
    null_y: NullCondition = None,
) -> Tensor:
    """The noise that data comes from, back along the flow: x_{t-d} = x_t - d s(x_t, t - d, 0) with d = 1/steps.

    Sampling from that noise gives the data again, to first order in 1/steps. Small steps are needed: a shortcut starts
    at its earlier end, where the way back arrives. The network is called at the times of sampling, known from training.

    >>> noise = invert(net, images, labels, steps=256)
    >>> again = sample(net, noise, labels, steps=256)

    Args:
        net: a network that knows the flow: any but one of consistency training or distillation.
        data: x_1, (b, *shape), converted to the precision of a float32 network.
        y, guidance_scale, null_y: see :func:`sample`.
        steps: how many, each one call of the network.

    Returns:
        x_0, (b, *shape).

    Raises:
        ValueError: for steps below 1, shapes that do not fit, or guidance without a condition or null_y.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    x_t = as_state(net, data)
    check_state(x_t, torch.empty(len(x_t)), what="data")
    y = as_condition(y, x_t.device)
    check_rows(y, len(x_t))
    guided = _Guided(net, y, guidance_scale, null_y, finest_steps=steps, flow_only=True, sampler="euler")
    for i in reversed(range(steps)):
        x_t = x_t - guided.velocity(x_t, i / steps, 0.0) / steps
    return x_t


def _start(net: Network, noise: Tensor | Sequence[int], generator: Generator | None) -> Tensor:
    """The noise that is given, or drawn where the network is, in the network's precision."""
    if not isinstance(noise, Tensor):
        home = home_of(net)
        noise = draw_noise(noise, generator=generator, device=None if home is None else home.device)
    return as_state(net, noise)


class _Guided(NamedTuple):
    """The network and what it is called with at every step."""

    net: Network
    y: Condition
    guidance_scale: float
    null_y: NullCondition
    finest_steps: int
    flow_only: bool
    sampler: SamplerKind

    def d_cond(self, t: float, size: float, steps: int) -> float:
        """The step size that the network is given at time t."""
        if self.flow_only:
            return 0.0
        if self.sampler == "consistency":
            return 1 - t
        if self.sampler == "live_reflow" and steps < self.finest_steps:
            return 1.0
        # A finer step follows the flow, which training names 1/M.
        return max(size, 1 / self.finest_steps)

    def velocity(self, x_t: Tensor, t: float, d_cond: float) -> Tensor:
        """s(x_t, t, d_cond, y), guided."""
        time, d = (torch.full((len(x_t),), value, device=x_t.device) for value in (t, d_cond))
        return guided_velocity(self.net, x_t, time, d, self.y, scale=self.guidance_scale, null_y=self.null_y).to(
            x_t.dtype
        )


def _walk(
    guided: _Guided,
    x_t: Tensor,
    steps: int | Sequence[float],
    fresh_noise: FreshNoise | None,
    generator: Generator | None,
    progress: bool,
) -> Iterator[tuple[float, Tensor]]:
    """Yield (t, x_t) after each step."""
    sizes = step_sizes(steps, guided.finest_steps)
    check_state(x_t, torch.empty(len(x_t)), what="noise")
    check_rows(guided.y, len(x_t), of="noise")
    if guided.sampler not in get_args(SamplerKind):
        raise ValueError(f"unknown sampler {guided.sampler!r}; known: {', '.join(get_args(SamplerKind))}")
    t = 0.0
    for i, size in enumerate(_with_progress(sizes, progress)):
        v = guided.velocity(x_t, t, guided.d_cond(t, size, len(sizes)))
        # Equal steps are counted, not added up, so that t is i/N to the last bit.
        next_t = min((i + 1) * size if len(set(sizes)) == 1 else t + size, 1.0)
        if guided.sampler == "consistency":
            x_t = x_t + (1 - t) * v
            if i + 1 < len(sizes):
                x_t = next_t * x_t + (1 - next_t) * _fresh(fresh_noise, generator, i, x_t)
        else:
            x_t = x_t + size * v
        t = next_t
        yield t, x_t


def _fresh(fresh_noise: FreshNoise | None, generator: Generator | None, i: int, x_t: Tensor) -> Tensor:
    """The noise to add after step i, of x_t's shape."""
    if fresh_noise is None:
        if generator is None:
            raise ValueError("sampler 'consistency' adds noise after each step: pass fresh_noise or a generator")
        return torch.randn(x_t.shape, dtype=x_t.dtype, device=generator.device, generator=generator).to(x_t.device)
    noise = fresh_noise(i)
    if noise.shape != x_t.shape:
        raise ValueError(f"fresh_noise must give the shape of x_t, {tuple(x_t.shape)}, not {tuple(noise.shape)}")
    return noise.to(x_t)


def _with_progress(sizes: list[float], progress: bool) -> Iterator[float]:
    if not progress:
        return iter(sizes)
    from tqdm import tqdm

    return iter(tqdm(sizes, desc="sampling", unit="step"))
