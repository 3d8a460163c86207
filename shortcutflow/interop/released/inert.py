"""What a restricted pickle may name, and the values without behaviour that stand for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from shortcutflow.interop.released.stored_array import StoredArray

RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
"""How arrays are rebuilt up to protocol 4, and from 5 on; under numpy 1 and numpy 2."""
NDARRAY, DTYPE = "numpy.ndarray", "numpy.dtype"
FROZEN_DICT = "flax.core.frozen_dict.FrozenDict"
ADAM = "optax._src.transform.ScaleByAdamState"
EMPTY = "optax._src.base.EmptyState"
SCHEDULE = "optax._src.transform.ScaleByScheduleState"
ALLOWED = (*RECONSTRUCT, *FROM_BUFFER, NDARRAY, DTYPE, FROZEN_DICT, ADAM, EMPTY, SCHEDULE)

NUMBERS = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


class InertTuple(NamedTuple):
    """What was a named tuple of the optimizer: its class by name, and its values."""

    name: str
    values: tuple[Any, ...]


class GlobalName(NamedTuple):
    """One of the allowed names; nothing is behind it."""

    name: str


class StoredBytes(NamedTuple):
    """Where bytes are in the file."""

    offset: int
    length: int


@dataclass
class NamedDtype:
    """A type of numbers: its code, and the order of its bytes."""

    code: str
    order: Literal["<", ">", "|", "="] = "="

    def built(self) -> np.dtype:
        """As numpy has it."""
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass
class UnbuiltArray:
    """An array whose place in the file comes later, if it comes."""

    stored: StoredArray | None = None


@dataclass
class FrozenDict:
    """What was flax's dictionary."""

    values: dict[str, Any]


MARK = object()
"""On the machine's stack, where a list of values begins."""

DEEPEST, MOST_VALUES = 16, 200_000


def plain(value: Any) -> Any:
    """What the machine built as plain values, no deeper and no more than a checkpoint is.

    A file of a few bytes can name one value many times over, in itself even, so that what it stands for has no end.

    Raises:
        ValueError: if it is nested too deep, or stands for too much.
    """
    seen = 0

    def of(value: Any, depth: int) -> Any:
        nonlocal seen
        seen += 1
        if depth > DEEPEST:
            raise ValueError(f"its values are nested more than {DEEPEST} deep")
        if seen > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES} values")
        match value:
            case FrozenDict(values):
                return of(values, depth + 1)
            case dict():
                return {key: of(part, depth + 1) for key, part in value.items()}
            case InertTuple(name, values):
                return InertTuple(name, tuple(of(part, depth + 1) for part in values))
            case UnbuiltArray(StoredArray() as stored):
                return stored
            case GlobalName() | StoredBytes() | NamedDtype() | UnbuiltArray():
                raise ValueError(f"it holds a {_WORDS[type(value)]} where a value belongs")
            case tuple():
                return tuple(of(part, depth + 1) for part in value)
        return value

    return of(value, 0)


_WORDS = {GlobalName: "name", StoredBytes: "string of bytes", NamedDtype: "type", UnbuiltArray: "half-built array"}
