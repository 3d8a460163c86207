"""A network and how it is asked: samples, and where it says that any state comes to at t = 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortcutflow.guidance import guided_velocity
from shortcutflow.path import data_end
from shortcutflow.sampling import FreshNoise, Trajectory, trajectory
from shortcutflow.schedule import levels_of
from shortcutflow.types import Network, SamplerKind


@dataclass(frozen=True)
class Predictor:
    """A network with what its sampler must know; the fields are arguments of :func:`shortcutflow.sample`."""

    net: Network
    guidance_scale: float = 1.0
    null_y: float | None = None
    finest_steps: int = 128
    flow_only: bool = False
    sampler: SamplerKind = "euler"

    @property
    def knows_flow(self) -> bool:
        """Whether it may be asked for the velocity of the flow, d = 0; a consistency model only knows 1 - t."""
        return self.sampler != "consistency"

    @property
    def knows_steps(self) -> bool:
        """Whether it was ever told a step size."""
        return not self.flow_only

    def sample(self, noise: Tensor, y: Tensor | None, *, steps: int, fresh_noise: FreshNoise | None = None) -> Tensor:
        """x_1 (b, *shape) from noise (b, *shape)."""
        return self.walk(noise, y, steps=steps, fresh_noise=fresh_noise).x_t[-1]

    def walk(self, noise: Tensor, y: Tensor | None, *, steps: int, fresh_noise: FreshNoise | None = None) -> Trajectory:
        """All states from the noise to the sample."""
        return trajectory(
            self.net, noise, y, steps=steps, guidance_scale=self.guidance_scale, null_y=self.null_y,
            finest_steps=self.finest_steps, flow_only=self.flow_only, sampler=self.sampler, fresh_noise=fresh_noise,
        )  # fmt: skip

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        """s(x_t, t, d, y), guided, in the type of x_t."""
        return guided_velocity(self.net, x_t, t, d, y, scale=self.guidance_scale, null_y=self.null_y).to(x_t.dtype)

    def end_by_flow(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x_t + (1 - t) s(x_t, t, 0): the mean of all data that x_t may be on its way to, by one evaluation."""
        return data_end(x_t, t, self.velocity(x_t, t, torch.zeros_like(t), y))

    def end_by_step(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x_t + (1 - t) s(x_t, t, 1 - t): one step to t = 1, which training knows where :func:`shortest_way` says so.

        Live reflow is told 1, as ever.
        """
        return data_end(x_t, t, self.velocity(x_t, t, self._told(1 - t), y))

    def end_by_steps(self, x_t: Tensor, t: float, y: Tensor | None) -> Tensor:
        """x_1 by the fewest steps from t that training knows; consistency models and live reflow know one from any t.

        Raises:
            ValueError: for a t that is no multiple of 1/M.
        """
        sizes = shortest_way(t, self.finest_steps) if self.sampler == "euler" else [1 - t]
        for size in sizes:
            now, d = (torch.full((len(x_t),), value, device=x_t.device) for value in (t, size))
            x_t = x_t + size * self.velocity(x_t, now, self._told(d), y)
            t += size
        return x_t

    def _told(self, d: Tensor) -> Tensor:
        return torch.ones_like(d) if self.sampler == "live_reflow" else d


def shortest_way(t: float, finest_steps: int) -> list[float]:
    """The fewest steps from t to 1, each of a dyadic size and starting at a multiple of it, as in training.

    From 1/8 these are 1/8, 1/4 and 1/2: at most log2(M), and one where 1 - t is a power of two.

    Args:
        t: a multiple of 1/M in [0, 1].
        finest_steps: M.

    Raises:
        ValueError: if t is no such multiple.
    """
    levels_of(finest_steps)
    place = round(t * finest_steps)
    if not 0 <= place <= finest_steps or abs(t * finest_steps - place) > 1e-6:
        raise ValueError(
            f"t must be a multiple of 1/{finest_steps} from 0 to 1, got {t}: training knows no other steps"
        )
    sizes = []
    while place < finest_steps:
        size = place & -place or finest_steps  # the largest power of two that divides place
        sizes.append(size / finest_steps)
        place += size
    return sizes
