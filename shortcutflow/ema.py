"""Exponential moving averages of the weights."""

from __future__ import annotations

import copy

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class AverageConfig(BaseModel):
    """How one average of the weights is kept.

    Args:
        decay: share of the old average that stays at each step.
        warm_up: start with decay (1 + i)/(10 + i) at step i until that exceeds ``decay``. Without it an average that
            makes targets starts from a network that outputs zero, and zero is a self-consistent answer: few-step
            samples are then still noise after thousands of steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(default=0.999, ge=0, lt=1)
    warm_up: bool = True

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step ``step``, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay


class Average:
    """A network whose weights are an exponential average of another's.

    The decay is a function of the step, so the weights are all there is to save. Build it before the network is
    sharded or compiled, then treat ``network`` as the other one.

    >>> average = Average(net, AverageConfig(decay=0.999))
    >>> average.update(net, step)      # after each optimizer step, counted from 0
    """

    def __init__(self, network: nn.Module, config: AverageConfig | None = None) -> None:
        self.config = config or AverageConfig()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._mine: list[Tensor] = []
        self._theirs: list[Tensor] = []

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """average = decay average + (1 - decay) weights; buffers are copied."""
        # Walking a network for its parameters takes a millisecond: once, and again if it has got new ones (sharding).
        if not self._theirs or next(network.parameters()) is not self._theirs[0]:
            self._mine, self._theirs = list(self.network.parameters()), list(network.parameters())
        torch._foreach_lerp_(self._mine, self._theirs, 1 - self.config.decay_at(step))
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
