"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field


class OptimizerConfig(BaseModel):
    """AdamW with decoupled weight decay on every parameter, as the reference code uses it.

    Args:
        lr: learning rate after the warm-up.
        betas, eps: of Adam.
        weight_decay: of all parameters, biases and tables included.
        warm_up_steps: steps over which the learning rate rises linearly from 0.
        schedule: "constant", or "cosine" down to 0, which the step after the last one would have.
        max_grad_norm: gradients of a larger norm are scaled down to it; None never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warm_up_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float | None = Field(default=None, gt=0)

    def lr_at(self, step: int, total_steps: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0, of ``total_steps``."""
        if step < self.warm_up_steps:
            return self.lr * (step + 1) / self.warm_up_steps
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warm_up_steps) / max(1, total_steps - self.warm_up_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in its fused form over the parameters that require a gradient."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
