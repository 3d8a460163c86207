"""A flow model as the start of a shortcut model: its step-size embedding made the same for every step size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def start_from_flow(network: nn.Module, finest_steps: int) -> None:
    """Make a network that was trained as a flow give, at every step size, what it gave at the one it was told.

    Flow matching tells a network d = 1/M at every step, so what its embedding of d gives elsewhere is whatever it was
    drawn as. Afterwards the last layer of that embedding has no weights, and as its bias the embedding of 1/M: outputs
    are those of the flow model for every d, and the gradient of the weights is not zero, so that they learn.

    Args:
        network: of this project's backbones, or of ``backbones.adapt``; changed in place. Before it is sharded.
        finest_steps: M of the flow's training; 1 for a network that was told d = 1 always (``ignore_step_size``).

    Raises:
        ValueError: for a network without such an embedding, one that was built to ignore the step size, or M that is
            no power of two.
    """
    if not isinstance(finest_steps, int) or finest_steps < 1 or finest_steps & (finest_steps - 1):
        raise ValueError(f"finest_steps must be a power of two, got {finest_steps!r}")
    condition: Any = getattr(network, "condition", None)
    step: Any = getattr(condition, "step", None)
    last = getattr(step, "out", None)
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"a {type(network).__name__} has no embedding of the step size in condition.step: only this project's "
            "backbones and networks of backbones.adapt() can start from a flow"
        )
    if getattr(condition, "ignore_step_size", False):
        raise ValueError("the network was built with ignore_step_size=True and would never learn it: build it without")
    level = torch.full((1,), math.log2(finest_steps), device=last.weight.device)
    told = step(level)[0]
    last.weight.zero_()
    last.bias.copy_(told)
