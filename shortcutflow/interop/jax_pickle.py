"""Reading the pickles of the authors' JAX code without running anything that is in them.

This is Python's own unpickler with a closed :meth:`find_class` and fewer operations: the ten names that such a file
refers to stand for the inert classes below, every other name and operation is refused. It is the unpickler written in
Python (``pickle._Unpickler``, from which joblib derives its reader too), because the one in C cannot be kept from
allocating what a few bytes claim (the index of a memo entry, the length of a string) and reads every array into memory.
Here, the numbers of arrays stay in the file, so that memory does not depend on its size.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUMBERS = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
"""Types of the numbers of an array."""
LONGEST_STRING = 256
"""Bytes of a string or a name; longer bytes, those of arrays, are left in the file."""
MOST_READS = 500_000
"""Of a file; a network of 28 blocks with its optimizer has about 100,000."""
DEEPEST, MOST_VALUES = 16, 200_000
"""Nesting and number of the values that a file stands for."""


def load_pickle(path: Path) -> Any:
    """The value in a pickle: dicts with strings as keys, tuples, numbers, None, :class:`StoredArray`, `StateTuple`.

    Raises:
        ValueError: in one line, naming the file, the place and what is wrong: an operation or a name that arrays do not
            need, lengths that do not fit the file, values that are too many or nested too deep.
    """
    with path.open("rb") as opened:
        file = _BoundedFile(opened, path)
        try:
            if file.read(1) != pickle.PROTO or file.read(1)[0] not in (3, 4, 5):
                raise ValueError("not a pickle of protocol 3, 4 or 5")
            value = _Unpickler(file).load()
            if (rest := file.size - opened.tell()) > 0:
                raise ValueError(f"{rest} bytes follow its end")
            # A file of a few bytes can name one value many times over, in itself even.
            for count, (part, depth) in enumerate(_walk(value, 0)):
                if count > MOST_VALUES or depth > DEEPEST:
                    raise ValueError(f"it stands for more than {MOST_VALUES} values, or is nested {DEEPEST} deep")
                if isinstance(part, StoredArray) and not hasattr(part, "shape"):
                    raise ValueError("it holds a half-built array")
        except Exception as error:  # a made-up file can make an unpickler fail in any way
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise ValueError(f"{path}: refused at byte {opened.tell()}: {reason}") from None
    return value


def _walk(value: Any, depth: int) -> Iterator[tuple[Any, int]]:
    yield value, depth
    if isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _walk(part, depth + 1)


class StoredBytes(NamedTuple):
    """Bytes that are still in the file."""

    path: Path
    offset: int
    length: int


class Dtype:
    """``numpy.dtype`` of a plain number."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in NUMBERS:
            raise ValueError(f"arrays of {code!r}; allowed are {', '.join(NUMBERS)}")
        self.dtype = np.dtype(code)

    def restore(self, state: Any) -> None:
        """Take the byte order from the state that numpy pickles."""
        if type(state) is not tuple or state[1:2] not in (("<",), (">",), ("|",), ("=",)) or state[2:4] != (None, None):
            raise ValueError("a type of numbers has a state that no plain number has")
        self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray:
    """``numpy.ndarray`` whose numbers are still in the file, unless they are few.

    Attributes:
        shape: of the array.
        dtype: of a number, with its byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def restore(self, state: Any) -> None:
        """Take shape, type and place from the state (version, shape, dtype, is_fortran, bytes) that numpy pickles."""
        _, shape, dtype, fortran, content = state
        if type(shape) is not tuple or len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array's shape is no short tuple of whole numbers")
        if not isinstance(dtype, Dtype) or not isinstance(content, bytes | StoredBytes):
            raise ValueError("an array has no type or no bytes")
        needed = math.prod(shape) * dtype.dtype.itemsize  # of whole numbers without a limit: nothing overflows
        held = len(content) if isinstance(content, bytes) else content.length
        if needed != held:
            raise ValueError(f"an array of shape {shape} takes {needed} bytes, the file holds {held} for it")
        self.shape, self.dtype, self._content, self._fortran = shape, dtype.dtype, content, bool(fortran)

    def read(self) -> np.ndarray:
        """The array, in memory of its own, in this machine's byte order."""
        if isinstance(self._content, bytes):
            numbers = np.frombuffer(self._content, self.dtype)
        else:
            path, offset, _ = self._content
            numbers = np.fromfile(path, self.dtype, math.prod(self.shape), offset=offset)
        numbers = numbers.astype(self.dtype.newbyteorder("="), copy=isinstance(self._content, bytes))
        return numbers.reshape(self.shape[::-1]).T if self._fortran else numbers.reshape(self.shape)


class FrozenDict(dict[str, Any]):
    """flax's dictionary, made of its entries or of the state of its class, which may have slots."""

    def __init__(self, values: Any = None) -> None:
        super().__init__()
        if values is not None:
            self.restore({"_dict": values})

    def restore(self, state: Any) -> None:
        """Take the entries."""
        values = (state[1] if type(state) is tuple else state)["_dict"]
        if type(values) is not dict:
            raise ValueError("a FrozenDict holds something that is no dictionary")
        self.update(values)


class StateTuple(tuple[Any, ...]):
    """One of optax's named tuples."""

    __slots__ = ()

    def __new__(cls, *values: Any) -> StateTuple:
        return super().__new__(cls, values)


class AdamState(StateTuple):
    """optax's ``ScaleByAdamState``: count, mean gradients mu, mean squares nu."""

    __slots__ = ()


def _reconstruct(*_: Any) -> StoredArray:
    """numpy's, up to protocol 4; what makes the array of it is its state."""
    return StoredArray()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
    """numpy's, from protocol 5 on."""
    array = StoredArray()
    array.restore((1, shape, dtype, order == "F", content))
    return array


ALLOWED: dict[str, Any] = {
    **dict.fromkeys(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), _reconstruct),
    **dict.fromkeys(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), _frombuffer),
    "numpy.ndarray": None,
    "numpy.dtype": Dtype,
    "flax.core.frozen_dict.FrozenDict": FrozenDict,
    "optax._src.transform.ScaleByAdamState": AdamState,
    "optax._src.transform.ScaleByScheduleState": StateTuple,
    "optax._src.base.EmptyState": StateTuple,
}
"""The names that a file may refer to, and what stands for them."""


class _Operations(dict[int, Callable[..., Any]]):
    """Of an unpickler, by their codes."""

    def __missing__(self, code: int) -> Any:
        raise ValueError(f"it has the operation {code:#x}, which no dictionary of arrays needs")


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Knows the operations of a dictionary of arrays."""

    dispatch = _Operations({
        code[0]: _PythonUnpickler.dispatch[code[0]]
        for code in (
            pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
            pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE,
            pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE,
            pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE, pickle.MEMOIZE, pickle.BINPUT,
            pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE,
            pickle.NEWOBJ,
        )
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; ValueError for any but those of :data:`ALLOWED`."""
        if f"{module}.{name}" not in ALLOWED:
            raise ValueError(f"it names {f'{module}.{name}'!r}, which no checkpoint needs")
        return ALLOWED[f"{module}.{name}"]

    def _load_frame(self) -> None:
        self.read(8)  # a hint at how much to read at once

    def _load_items(self) -> None:
        self._set_items(self.pop_mark())

    def _load_item(self) -> None:
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def _set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        # Also because hashing deeply nested tuples has no bound.
        if not isinstance(target, dict) or not all(type(key) is str for key in flat[::2]):
            raise ValueError("it fills something that is no dictionary with strings as keys")
        target.update(zip(flat[::2], flat[1::2], strict=True))

    def _load_state(self) -> None:
        state = self.stack.pop()
        self.stack[-1].restore(state)

    dispatch |= {
        pickle.FRAME[0]: _load_frame, pickle.SETITEM[0]: _load_item, pickle.SETITEMS[0]: _load_items,
        pickle.BUILD[0]: _load_state, pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]],
    }  # fmt: skip


class _BoundedFile:
    """A file of which only so many short pieces are read."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path, self.size, self._reads = file, path, path.stat().st_size, 0

    def read(self, count: int) -> Any:
        """So many bytes, or where they are if they are too many for a string."""
        self._reads += 1
        if self._reads > MOST_READS:
            raise ValueError(f"it has more than {MOST_READS} parts, which no checkpoint has")
        offset = self._file.tell()
        if count > self.size - offset:
            raise ValueError(f"it claims {count} bytes where {self.size - offset} are left: cut off or made up")
        if count <= LONGEST_STRING:
            return self._file.read(count)
        self._file.seek(count, 1)
        return StoredBytes(self._path, offset, count)

    def readline(self) -> bytes:
        """A line, which is the name of a module or of something in it."""
        line: bytes = self._file.readline(LONGEST_STRING)
        if not line.endswith(b"\n"):
            raise ValueError(f"a name is cut off, or longer than {LONGEST_STRING} bytes")
        return line
