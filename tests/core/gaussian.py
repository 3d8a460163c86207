"""A shortcut model in closed form, for Gaussian data.

For x_1 ~ N(mu, diag(s^2)) and x_0 ~ N(0, I) every marginal of x_t = (1 - t) x_0 + t x_1 is Gaussian, with mean
m_t = t mu and variance sigma_t^2 = (1 - t)^2 + t^2 s^2, and the flow keeps the standardised state:

    x_r = m_r + (sigma_r / sigma_t) (x_t - m_t)

So the exact shortcut is (x_{t+d} - x_t) / d, its limit for d -> 0 is E[x_1 - x_0 | x_t], and the loss of flow matching
at that limit is the conditional variance of x_1 - x_0, which is not zero. Everything is computed in the state's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from shortcutflow.types import Network


@dataclass(frozen=True)
class Gaussian:
    """Data N(mu, diag(s^2)); mu and s are of the shape of one sample."""

    mu: Tensor
    s: Tensor

    @classmethod
    def example(cls, *shape: int) -> Gaussian:
        """Means between -1 and 1 and deviations between 0.3 and 1.6, another for each entry, in float64."""
        n = torch.Size(shape).numel()
        mu = torch.linspace(-1, 1, n, dtype=torch.float64)
        s = torch.linspace(0.3, 1.6, n, dtype=torch.float64).flip(0)
        return cls(mu.view(shape), s.view(shape))

    def draw(self, rows: int, generator: Generator) -> Tensor:
        """Samples of the data, (rows, *shape)."""
        noise = torch.randn((rows, *self.mu.shape), dtype=self.mu.dtype, generator=generator)
        return self.mu + self.s * noise

    def noise(self, rows: int, generator: Generator) -> Tensor:
        """Standard normal noise, (rows, *shape)."""
        return torch.randn((rows, *self.mu.shape), dtype=self.mu.dtype, generator=generator)

    def variance(self, t: Tensor) -> Tensor:
        """sigma_t^2, (b, *shape)."""
        t = self._column(t)
        return (1 - t) ** 2 + t**2 * self.s**2

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The exact x_r of a particle at x_t."""
        ratio = (self.variance(r) / self.variance(t)).sqrt()
        return self._column(r) * self.mu + ratio * (x_t - self._column(t) * self.mu)

    def shortcut(self, x_t: Tensor, t: Tensor, d: Tensor) -> Tensor:
        """The exact average velocity over [t, t + d]."""
        return (self.flow_map(x_t, t, t.double() + d.double()) - x_t) / self._column(d)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The instantaneous velocity E[x_1 - x_0 | x_t]."""
        slope = self._covariance(t) / self.variance(t)
        return self.mu + slope * (x_t - self._column(t) * self.mu)

    def velocity_variance(self, t: Tensor) -> Tensor:
        """Var(x_1 - x_0 | x_t), which does not depend on x_t; (b, *shape)."""
        return 1 + self.s**2 - self._covariance(t) ** 2 / self.variance(t)

    def net(self, flow_below: float = 0.0) -> Network:
        """The exact network: the velocity for d <= flow_below, else the exact shortcut; d = 0 always follows."""

        def exact(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
            follows_flow = d <= flow_below
            # Any positive number serves where the velocity is taken: the shortcut is not looked at there.
            step = self.shortcut(x_t, t, torch.where(follows_flow, torch.ones_like(d), d))
            return torch.where(self._column(follows_flow) > 0, self.velocity(x_t, t), step)

        return exact

    def _covariance(self, t: Tensor) -> Tensor:
        """Cov(x_1 - x_0, x_t), (b, *shape)."""
        t = self._column(t)
        return t * self.s**2 - (1 - t)

    def _column(self, t: Tensor) -> Tensor:
        return t.to(self.mu.dtype).view(-1, *(1,) * self.mu.ndim)


def order_of(sizes: list[float], errors: list[float]) -> float:
    """The p of error ~ size^p, by least squares in logarithms."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
