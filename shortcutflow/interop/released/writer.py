"""Writing a checkpoint that the released code loads: the pickle it would have written, array by array.

The names of numpy's, flax's and optax's parts are written as words; none of these packages is needed, and what
numpy calls its modules today does not show. ``numpy.core`` is the name that numpy 1 and numpy 2 both know.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shortcutflow.interop.released.inert import ADAM, DTYPE, EMPTY, NDARRAY, RECONSTRUCT, SCHEDULE

Read = Callable[[], np.ndarray]
"""Gives an array when it is its turn."""


def write_released(
    path: Path, *, params: Mapping[str, Read], params_ema: Mapping[str, Read], step: int, timestamp: float
) -> None:
    """Write a checkpoint; the optimizer's state is a fresh one, with all moments and counts zero.

    The released code needs the entry to be there and drops it when it loads, so training goes on with new moments.

    Args:
        path: of the file.
        params, params_ema: arrays by flax name joined with '/'.
        step: the released code's count.
        timestamp: seconds since 1970.
    """
    with path.open("wb") as file:
        pickle_released(file, params=params, params_ema=params_ema, step=step, timestamp=timestamp)


def pickle_released(
    file: BinaryIO, *, params: Mapping[str, Read], params_ema: Mapping[str, Read], step: int, timestamp: float
) -> None:
    """As :func:`write_released`, into an open file."""
    out = _Pickler(file)
    file.write(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK)
    out.text("train_state")
    file.write(pickle.EMPTY_DICT + pickle.MARK)
    for name, arrays in (("params", params), ("params_ema", params_ema)):
        out.text(name)
        out.tree(arrays)
    out.text("opt_state")
    out.fresh_optimizer({name: _zeros_like(read) for name, read in params.items()})
    out.text("step")
    out.array(np.asarray(step, np.int32))
    file.write(pickle.SETITEMS)
    out.text("_timestamp")
    file.write(pickle.BINFLOAT + struct.pack(">d", timestamp) + pickle.SETITEMS + pickle.STOP)


class _Pickler:
    """Writes values as operations of a pickle, protocol 4."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def fresh_optimizer(self, zeros: Mapping[str, Read]) -> None:
        """``((ScaleByAdamState(count, mu, nu), EmptyState(), ScaleByScheduleState(count)),)`` at step 0."""
        write, count = self._file.write, np.zeros((), np.int32)
        self.name(ADAM)
        self.array(count)
        self.tree(zeros)
        self.tree(zeros)
        write(pickle.TUPLE3 + pickle.NEWOBJ)
        self.name(EMPTY)
        write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.name(SCHEDULE)
        self.array(count)
        write(pickle.TUPLE1 + pickle.NEWOBJ + pickle.TUPLE3 + pickle.TUPLE1)

    def tree(self, arrays: Mapping[str, Read], prefix: str = "") -> None:
        """Nested dictionaries of arrays, keys in order."""
        self._file.write(pickle.EMPTY_DICT + pickle.MARK)
        for key in sorted({name.removeprefix(prefix).split("/")[0] for name in arrays if name.startswith(prefix)}):
            self.text(key)
            if prefix + key in arrays:
                self.array(arrays[prefix + key]())
            else:
                self.tree({n: a for n, a in arrays.items() if n.startswith(f"{prefix}{key}/")}, f"{prefix}{key}/")
        self._file.write(pickle.SETITEMS)

    def array(self, array: np.ndarray) -> None:
        """``_reconstruct(ndarray, (0,), b"b")`` and its state (1, shape, dtype, is_fortran, bytes)."""
        write = self._file.write
        self.name(RECONSTRUCT[0])
        self.name(NDARRAY)
        self._number(0)
        write(pickle.TUPLE1 + pickle.SHORT_BINBYTES + b"\x01b" + pickle.TUPLE3 + pickle.REDUCE)
        write(pickle.MARK)
        self._number(1)
        write(pickle.MARK)
        for size in array.shape:
            self._number(size)
        write(pickle.TUPLE)
        self._dtype(array.dtype.newbyteorder("<"))
        content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        write(pickle.NEWFALSE + pickle.BINBYTES8 + struct.pack("<Q", len(content)))
        write(content)
        write(pickle.TUPLE + pickle.BUILD)

    def name(self, full: str) -> None:
        """A reference to something in a module."""
        module, _, name = full.rpartition(".")
        self._file.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def text(self, text: str) -> None:
        """A string."""
        content = text.encode()
        self._file.write(pickle.BINUNICODE + struct.pack("<I", len(content)) + content)

    def _dtype(self, dtype: np.dtype) -> None:
        self.name(DTYPE)
        self.text(dtype.str[1:])
        self._file.write(pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE + pickle.MARK)
        self._number(3)
        self.text("<")
        self._file.write(3 * pickle.NONE)
        for value in (-1, -1, 0):
            self._number(value)
        self._file.write(pickle.TUPLE + pickle.BUILD)

    def _number(self, value: int) -> None:
        self._file.write(pickle.BININT + struct.pack("<i", value))


def _zeros_like(read: Read) -> Read:
    return lambda: np.zeros_like(read())
