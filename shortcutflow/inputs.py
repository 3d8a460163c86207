"""The precision in which a network takes data and noise."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from shortcutflow.types import Network


def home_of(net: Network) -> Tensor | None:
    """The network's first floating-point parameter, or else buffer: where it is and in which precision.

    None of a callable that is no module, nor a module's method, nor a ``partial`` of one.
    """
    called: Any = net
    if isinstance(called, partial):
        called = called.func
    called = getattr(called, "__self__", called)
    if not isinstance(called, nn.Module):
        return None
    return next((p for p in chain(called.parameters(), called.buffers()) if p.is_floating_point()), None)


def as_state(net: Network, x: Tensor) -> Tensor:
    """x (b, *shape) in the precision of a float32 or float64 network; any x of another network as it is.

    A network in 16 bits may cast its inputs itself, so the states between its steps keep the precision they have.
    """
    home = home_of(net)
    if home is None or home.dtype not in (torch.float32, torch.float64) or not x.is_floating_point():
        return x
    return x.to(home.dtype)
