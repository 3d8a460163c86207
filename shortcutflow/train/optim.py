"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shortcutflow.sharded import local, whole


class OptimizerConfig(BaseModel):
    """AdamW with decoupled weight decay on every parameter, as the released code uses it.

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


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """The norm of all gradients, over all processes, before they are scaled down to max_norm, if one is given."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return whole(norm)


class UpdateNorms:
    """Norms of the weights and of what one step changes in them. Made before the step, asked after it.

    Args:
        optimizer: whose parameters they are.
        sum_over_shards: adds a 0-d tensor up over the processes among which the weights are sharded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sum_over_shards: Callable[[Tensor], Tensor]) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._sum = sum_over_shards
        self._before = [part.detach().clone() for part in self._parts()]

    def take(self) -> dict[str, float]:
        """``parameter_norm`` before the step and ``update_norm``."""
        squares = torch.stack(
            [
                torch.stack([old.square().sum(), (new - old).square().sum()])
                for old, new in zip(self._before, self._parts(), strict=True)
            ]
        ).sum(0)
        weights, update = self._sum(squares.detach()).sqrt().tolist()
        return {"parameter_norm": weights, "update_norm": update}

    def _parts(self) -> list[Tensor]:
        return [local(p) for p in self._parameters]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
