"""Diffusion networks as velocities of the straight path from noise to data.

A diffusion network was trained on z = alpha x_1 + sigma eps with alpha^2 + sigma^2 = 1 ("variance preserving": DDPM, Ho
et al., arXiv 2006.11239, eq. 4) at times i = 0 (data) ... n - 1 (noise), alpha_i^2 = prod_{j <= i} (1 - beta_j). The
path here is x_t = t x_1 + (1 - t) eps. They are one process, up to a factor and a change of time (as in Lipman et al.,
arXiv 2210.02747, and Kingma & Gao, arXiv 2303.00848): with r = sqrt(t^2 + (1 - t)^2)

    x_t / r = alpha x_1 + sigma eps,    alpha = t / r,    sigma = (1 - t) / r,

so the network is given x_t / r at the time i where sigma_i / alpha_i = (1 - t) / t, and what it predicts,

    "noise"   eps                       x_1 = (z - sigma eps) / alpha
    "data"    x_1                       eps = (z - alpha x_1) / sigma
    "v"       alpha eps - sigma x_1     x_1 = alpha z - sigma v,   eps = sigma z + alpha v   (arXiv 2202.00512),

makes the velocity x_1 - eps = (x_1 - x_t) / (1 - t) = (x_t - eps) / t.

Between two of its times, i is found by interpolation of log(sigma / alpha). Outside of them the network gets its
first or last time, z = x_t / r stays what it is, and of the two forms of the velocity that one is taken which is finite
there: close to noise (x_1 - x_t) / (1 - t), with x_1 made of alpha and sigma of the last time, and close to data
(x_t - eps) / t, with eps made of those of the first. At both borders the forms agree, so the velocity is continuous.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PREDICTIONS = ("noise", "v", "data")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class Diffusion(nn.Module):
    """How a diffusion network's times and predictions belong to the path x_t = (1 - t) x_0 + t x_1.

    Args:
        predicts: "noise", "data", or "v" for alpha eps - sigma x_1.
        schedule: how beta runs from ``beta_start`` to ``beta_end``: "linear", "scaled_linear" (its root does),
            "sigmoid"; or "squaredcos_cap_v2", which takes neither.
        steps: number of times.
        beta_start, beta_end: first and last beta.
        betas: all of them, instead of a schedule.
        zero_terminal_snr: scaled so that the last time has no data in it (arXiv 2305.08891).

    Raises:
        ValueError: for an unknown prediction or schedule, or betas outside of (0, 1).
    """

    log_ratios: Tensor

    def __init__(
        self,
        predicts: str = "noise",
        *,
        schedule: str = "linear",
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        betas: Sequence[float] | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        super().__init__()
        if predicts not in PREDICTIONS:
            raise ValueError(f"predicts must be one of {', '.join(map(repr, PREDICTIONS))}, got {predicts!r}")
        self.predicts = predicts
        given = _betas(schedule, steps, beta_start, beta_end) if betas is None else _given_betas(betas)
        self._table = _log_ratios(given, zero_terminal_snr)
        self.register_buffer("log_ratios", torch.empty(len(self._table), dtype=torch.float64), persistent=False)
        # (alpha, sigma) closest to data and closest to noise.
        self.first, self.last = (_alpha_sigma(float(self._table[i])) for i in (0, -1))
        self.reset_parameters()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Diffusion:
        """From the options of a config; raises ValueError for one that is not known or of a wrong type."""
        try:
            return cls(**options)
        except TypeError as error:
            raise ValueError(f"diffusion: {error}; it takes {inspect.signature(cls)}") from error

    def reset_parameters(self) -> None:
        """Fill the table anew."""
        self.log_ratios.copy_(self._table)

    def time(self, t: Tensor) -> Tensor:
        """The network's own time for t (b,): float32 in [0, steps - 1], 0 being data."""
        # In float32 the time of a network of 1000 would be off by 2e-4; Apple's devices have nothing else.
        precise = torch.float32 if t.device.type == "mps" else torch.float64
        table, t = self.log_ratios.to(precise), t.to(precise)
        t = t.clamp(self._t_of(self.last), self._t_of(self.first))
        ratio = torch.log1p(-t) - torch.log(t)
        # Counted, not searched for: that is as fast, and every exported format knows it.
        right = (table < ratio[:, None]).sum(1).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return (right - 1 + (ratio - low) / (high - low)).clamp(0, len(table) - 1).float()

    def state(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network is given: z = x_t / r, of x_t's shape and dtype."""
        return (x_t.float() / _like(_r(t), x_t)).to(x_t.dtype)

    def velocity(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_1 - eps for what the network predicted: x_t's shape and dtype, computed in float32."""
        gain, rest = (_like(c, x_t) for c in self._coefficients(t.float()))
        x = x_t.float()
        # Close to noise eps is close to x_t, close to data x_1 is: their difference comes first, and exactly.
        return (gain * (x - predicted.float()) + rest * x).to(x_t.dtype)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """g and h of the velocity g (x_t - predicted) + h x_t."""
        if self.predicts == "noise":
            return _of_noise(t, *self.last)
        if self.predicts == "data":
            # The same with data and noise exchanged, and so with the other sign.
            gain, rest = _of_noise(1 - t, *reversed(self.first))
            return -gain, -rest
        (alpha_0, sigma_0), (alpha_n, sigma_n) = self.first, self.last
        r = _r(t)
        to_x1, to_eps = (1 - t).clamp(min=0.1), t.clamp(min=0.1)  # each is used where it is larger
        of_x = (2 * t - 1) / r.square()
        of_v = -1 / r
        noisy, clean = t < self._t_of(self.last), t > self._t_of(self.first)
        of_x = torch.where(noisy, (alpha_n / r - 1) / to_x1, torch.where(clean, (1 - sigma_0 / r) / to_eps, of_x))
        of_v = torch.where(noisy, -sigma_n / to_x1, torch.where(clean, -alpha_0 / to_eps, of_v))
        return -of_v, of_x + of_v

    @staticmethod
    def _t_of(alpha_sigma: tuple[float, float]) -> float:
        alpha, sigma = alpha_sigma
        return alpha / (alpha + sigma)


def _of_noise(t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """g and h for a prediction of the noise, with the noisiest (alpha, sigma).

    (x_t - eps) / t, and below the border ((x_t / r - sigma eps) / alpha - x_t) / (1 - t).
    """
    border = alpha / (alpha + sigma)
    r = _r(t)
    # 1 / r - sigma without cancellation: 1 / r - 1 and 1 - sigma.
    excess = 2 * t * (1 - t) / (r * (1 + r)) + alpha**2 / (1 + sigma)
    rest = (1 - t).clamp(min=0.1)
    noisy = t < border
    gain = torch.where(noisy, sigma / alpha / rest, 1 / t.clamp(min=border))
    return gain, torch.where(noisy, (excess / alpha - 1) / rest, torch.zeros_like(t))


def _r(t: Tensor) -> Tensor:
    t = t.float()
    return (t.square() + (1 - t).square()).sqrt()


def _like(c: Tensor, x: Tensor) -> Tensor:
    """(b,) to (b, 1, ...)."""
    return c.view(-1, *(1,) * (x.ndim - 1))


def _alpha_sigma(log_ratio: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + math.exp(2 * log_ratio)), 1 / math.sqrt(1 + math.exp(-2 * log_ratio))


def _log_ratios(betas: Tensor, zero_terminal_snr: bool) -> Tensor:
    """log(sigma_i / alpha_i), float64, rising."""
    alpha = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        alpha[-1] = alpha[-2] / 2  # not nothing: the logarithm must be finite
    kept = alpha.square()
    ratios = (torch.log1p(-kept) - kept.log()) / 2
    if not (ratios.isfinite().all() and (ratios.diff() > 0).all()):
        raise ValueError("these betas do not add noise at each of their steps")
    return ratios


def _given_betas(betas: Sequence[float]) -> Tensor:
    # Where tensors are made by default does not matter: the table is always kept on the CPU.
    return _checked(torch.tensor(list(betas), dtype=torch.float64, device="cpu"))


def _betas(schedule: str, steps: int, start: float, end: float) -> Tensor:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    if not 2 <= steps <= 1_000_000:
        raise ValueError(f"a diffusion has between 2 and 1000000 steps, got {steps}")
    whole: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    match schedule:
        case "linear":
            betas = torch.linspace(start, end, steps, **whole)
        case "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, **whole).square()
        case "sigmoid":
            betas = torch.linspace(-6, 6, steps, **whole).sigmoid() * (end - start) + start
        case _:
            share = torch.arange(steps + 1, **whole) / steps
            kept = ((share + 0.008) / 1.008 * math.pi / 2).cos().square()
            betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return _checked(betas)


def _checked(betas: Tensor) -> Tensor:
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must be at least two numbers between 0 and 1")
    return betas
