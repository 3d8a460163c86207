"""EMA of the weights: exponential, and power-function EMA from which other widths can be made after training."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import compress
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from shortcutflow.dtensor import to_local
from shortcutflow.old_names import renamed_attribute

MAX_SIGMA_REL = 12**-0.5
"""The relative width of a plain mean of all weights; a power-function EMA is narrower."""


class EMAConfig(BaseModel):
    """How one exponential moving average (EMA) of the weights is kept.

    Args:
        decay: fraction of the old EMA that stays at each step.
        warm_up: start with decay (1 + i)/(10 + i) at step i until that exceeds ``decay``. Without it an EMA that
            makes targets starts from a network that outputs zero, and zero is a self-consistent answer: few-step
            samples are then still noise after thousands of steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["exponential"] = "exponential"
    decay: float = Field(default=0.999, ge=0, lt=1)
    warm_up: bool = True

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step ``step``, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay


class PowerFunctionEMAConfig(BaseModel):
    """How one power-function EMA is kept (Karras et al. 2024, arXiv 2312.02696, section 3.1).

    At step t the weights of step i count in proportion to i^gamma: the EMA grows longer with training, and the
    first weights never count. From its snapshots EMAs of other widths can be made later (``posthoc``).

    Args:
        sigma_rel: standard deviation of the profile i^gamma as a fraction of t; 0.05 remembers about the last tenth.
        snapshot_every: steps between the snapshots kept for later; 0 none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["power"] = "power"
    sigma_rel: float = Field(default=0.05, gt=0, lt=MAX_SIGMA_REL)
    snapshot_every: int = Field(default=0, ge=0)

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step ``step``, counted from 0."""
        return (1 - 1 / (step + 1)) ** (gamma_of(self.sigma_rel) + 1)


AnyEMAConfig = EMAConfig | PowerFunctionEMAConfig
"""Distinguished by their fields; with none given it is the exponential one, as in configs older than ``kind``."""


@lru_cache
def gamma_of(sigma_rel: float) -> float:
    """The gamma > 0 whose profile i^gamma has this relative width.

    Solves sigma_rel^2 = (gamma + 1)/((gamma + 2)^2 (gamma + 3)), a cubic in gamma with one positive root.

    Raises:
        ValueError: for a width outside (0, 12^-0.5).
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel must lie between 0 and {MAX_SIGMA_REL:.4f} (a plain mean), got {sigma_rel}")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMA:
    """A network whose weights are the EMA of another's.

    The decay is a function of the step, so the weights are all there is to save. Build it before the network is
    sharded or compiled, then treat ``network`` as the other one.

    >>> ema = EMA(net, EMAConfig(decay=0.999))
    >>> ema.update(net, step)      # after each optimizer step, counted from 0
    """

    def __init__(self, network: nn.Module, config: AnyEMAConfig | None = None) -> None:
        self.config = config or EMAConfig()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._ema_parameters: list[Tensor] = []
        self._parameters: list[Tensor] = []
        self._sharded: list[Any] = []
        self._rounded_off: dict[int, Tensor] = {}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """ema = decay ema + (1 - decay) weights; buffers are copied.

        Of networks that were sharded (FSDP2), both in the same way, each rank averages its own shards.
        """
        _reshard(self._sharded)
        # Walking a network for its parameters takes a millisecond: once, and again if it has got new ones (sharding).
        if not self._parameters or next(network.parameters()) is not self._parameters[0]:
            self._sharded = [m for net in (self.network, network) for m in net.modules() if hasattr(m, "reshard")]
            _reshard(self._sharded)
            self._rounded_off.clear()
            self._ema_parameters, self._parameters = list(self.network.parameters()), list(network.parameters())
        ema, online = [to_local(p) for p in self._ema_parameters], [to_local(p) for p in self._parameters]
        weight = 1 - self.config.decay_at(step)
        whole = [not _is_half(p) for p in ema]
        if any(whole):
            torch._foreach_lerp_(list(compress(ema, whole)), list(compress(online, whole)), weight)
        for i, (p, other) in enumerate(zip(ema, online, strict=True)):
            if _is_half(p):
                # A small change rounds away in 16 bits: what is lost is kept next to the weights and added next time.
                exact = p.float() + self._rounded_off.get(i, 0.0)
                exact.lerp_(other.float(), weight)
                p.copy_(exact)
                self._rounded_off[i] = exact - p.float()
        if buffers := list(self.network.buffers()):
            torch._foreach_copy_(buffers, list(network.buffers()))


def _is_half(p: Tensor) -> bool:
    return p.dtype in (torch.float16, torch.bfloat16)


@torch.no_grad()
def copy_weights(into: nn.Module, of: nn.Module) -> None:
    """Give a network the weights and buffers of an equal one, which is sharded as it is, if at all."""
    _reshard([m for net in (into, of) for m in net.modules() if hasattr(m, "reshard")])
    for target, source in zip(into.parameters(), of.parameters(), strict=True):
        to_local(target).copy_(to_local(source))
    for buffer, source_buffer in zip(into.buffers(), of.buffers(), strict=True):
        buffer.copy_(source_buffer)


def _reshard(sharded: list[Any]) -> None:
    # FSDP2 leaves the outermost module gathered after a forward pass without a backward one, as an EMA makes to
    # compute targets. Its parameters are then a copy that no update would reach and that the next pass would still use.
    for module in sharded:
        module.reshard()


def __getattr__(name: str) -> Any:
    return renamed_attribute(__name__, name)
