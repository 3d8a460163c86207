"""Tensors that processes may hold in parts (DTensors), and those they do not, treated alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor


# Asked for by what they can do: the module of the class takes a second to load.
def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, as a view; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together, in every process; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
