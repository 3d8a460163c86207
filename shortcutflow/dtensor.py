"""Tensors that ranks may hold in shards (DTensors), and ordinary ones, treated alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor


# By attribute: the module of the class takes a second to load.
def is_sharded(tensor: Any) -> bool:
    """Whether this rank holds a shard of the tensor only."""
    return hasattr(tensor, "to_local")


def to_local(tensor: Any) -> Tensor:
    """This rank's shard of a sharded tensor, as a view; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Any) -> Tensor:
    """A sharded tensor gathered on every rank; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
