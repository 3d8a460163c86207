"""Small networks whose answers are known, for tests of objectives and sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shortcutflow.path import expand_to
from shortcutflow.types import Network


@dataclass(frozen=True)
class Call:
    """What a network was asked."""

    x_t: Tensor
    t: Tensor
    d: Tensor
    y: Tensor | None
    with_gradient: bool


@dataclass
class Recorder:
    """Passes every call on to a network and keeps what was asked; names itself in a shared log."""

    net: Network
    name: str = "net"
    calls: list[Call] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        self.log.append(self.name)
        self.calls.append(Call(x_t.detach().clone(), t, d, y, torch.is_grad_enabled()))
        return self.net(x_t, t, d, y)


def zero(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
    return torch.zeros_like(x_t)


def affine(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
    """x_t / 2 + t + 3 d + y: another answer whenever any of the four changes."""
    v = 0.5 * x_t + expand_to(t + 3 * d, x_t)
    if y is None:
        return v
    return v + expand_to(y.flatten(1).sum(1) if y.ndim > 1 else y, x_t)


class Learner(nn.Module):
    """A module with three numbers to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        a, b, c = self.weight
        return a * x_t + expand_to(b * t + c * d, x_t)


class Falsy(Learner):
    """A module that counts as False, as an empty container does."""

    def __len__(self) -> int:
        return 0
