"""What consistency training and distillation share: where a network's jump to t = 1 ends (Song et al. 2023).

A consistency model answers where the flow through x_t ends. In this library's terms it makes the one step that is left,
d = 1 - t, so its end point is f(x_t, t) = x_t + (1 - t) s(x_t, t, 1 - t), which is x_t itself at t = 1. It is taught
that two neighbours on a trajectory have one end:

    f(x_t, t)  <-  f(x_{t+d}, t + d)     as a velocity     s(x_t, t, 1 - t)  <-  (f(x_{t+d}, t + d) - x_t) / (1 - t)
"""

from __future__ import annotations

import torch
from torch import Tensor

from shortcutflow.guidance import predict
from shortcutflow.objectives.objective import FinestSteps, TrainingObjective, magnitudes
from shortcutflow.path import data_end, expand_to
from shortcutflow.types import Network, SamplerKind, Targets


class ConsistencyObjective(TrainingObjective):
    """Base of the two. The network is told d = 1 - t, in training and by its sampler."""

    finest_steps: FinestSteps = 128

    @property
    def tells_step_size(self) -> bool:
        """True: the step to the end, 1 - t; no other."""
        return True

    @property
    def sampler(self) -> SamplerKind:
        """Jump to the end, noise again, jump again."""
        return "consistency"


def same_end(
    net: Network, x_t: Tensor, t: Tensor, next_x: Tensor, next_t: Tensor, y: Tensor | None, leg: Tensor
) -> Targets:
    """Rows that are to end where net says that their neighbours do.

    Args:
        net: asked at the neighbours.
        x_t, t: (b, *shape) and (b,), t < 1.
        next_x, next_t: the neighbours, at later times up to 1, where the end is the neighbour itself.
        y: conditions, dropped ones already replaced.
        leg: (b, *shape) the velocity that led to the neighbours, for the metrics.
    """
    next_v = predict(net, next_x, next_t, 1 - next_t, y)
    end = torch.where(expand_to(next_t, next_x) < 1, data_end(next_x, next_t, next_v), next_x)
    v = ((end - x_t) / expand_to(1 - t, x_t)).to(x_t.dtype)
    metrics = magnitudes(bootstrap=v, b1=leg, b2=next_v)
    return Targets(x_t, t, 1 - t, y, v, n_bootstrap=len(t), metrics=metrics)
