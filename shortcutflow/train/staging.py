"""Which tensors a process copies for a checkpoint, and how a GPU's get into host memory with one wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shortcutflow.sharded import is_sharded


def share(flat: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """What one of ``size`` processes saves: its parts of sharded tensors, and about as many bytes as each other one of
    those that all of them hold whole.
    """
    given = [0] * size
    whole = sorted((name for name in flat if not is_sharded(flat[name])), key=lambda name: (-flat[name].nbytes, name))
    left_out = set()
    for name in whole:
        least = given.index(min(given))
        # A tensor costs a little however small it is.
        given[least] += flat[name].nbytes + 1
        if least != rank:
            left_out.add(name)
    return {name: tensor for name, tensor in flat.items() if name not in left_out}


def scalars_on_cpu(flat: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of one number on a GPU, such as AdamW's steps: PyTorch would wait for each, which it does not pin."""
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        if tensor.is_cuda and tensor.numel() == 1 and not is_sharded(tensor):
            by_dtype.setdefault(tensor.dtype, {})[name] = tensor.detach()
    copies: dict[str, Tensor] = {}
    for tensors in by_dtype.values():
        together = torch.stack([tensor.flatten() for tensor in tensors.values()]).cpu()
        copies |= {name: one.view(tensors[name].shape) for name, one in zip(tensors, together, strict=True)}
    return copies
