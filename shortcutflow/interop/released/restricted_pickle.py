"""Pickles of arrays, read by a machine that can build nothing else and runs none of their code.

Python's own unpickler imports and calls whatever a file names. This one knows the three dozen operations that a
dictionary of arrays and an optimizer's state need, the few names of ``inert``, and makes only plain values of them.
Bytes are not read but remembered by their place, so that a file of any size is gone through in a few megabytes; what a
file claims to hold is compared with its length before anything is believed.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from shortcutflow.interop.released import inert
from shortcutflow.interop.released.inert import (
    MARK,
    FrozenDict,
    GlobalName,
    InertTuple,
    NamedDtype,
    StoredBytes,
    UnbuiltArray,
    plain,
)
from shortcutflow.interop.released.stored_array import StoredArray

LONGEST_NAME = 256
"""Bytes of a string."""
MOST_OPERATIONS = 500_000
"""Of a file; a network of 28 blocks with its optimizer has about 50,000."""


def load(path: Path) -> Any:
    """The value in a pickle: dicts, tuples, numbers, strings, None, :class:`InertTuple` and :class:`StoredArray`.

    Raises:
        ValueError: naming the file, the place and what is wrong: an operation or a name that arrays do not need, a
            file that is cut off, lengths that do not fit.
    """
    with path.open("rb") as file:
        machine = _Machine(path, file)
        try:
            return plain(machine.run())
        except ValueError as error:
            raise ValueError(f"{path}: refused at byte {machine.at}: {error}") from None


class _Machine:
    """Runs the operations of one file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._size = path.stat().st_size
        self.at = 0
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.take(1) != pickle.PROTO or self.take(1)[0] not in (3, 4, 5):
            raise ValueError("not a pickle of protocol 3, 4 or 5")
        for _ in range(MOST_OPERATIONS):
            self.at = self._file.tell()
            code = self.take(1)
            if code == pickle.STOP:
                return self._result()
            if code not in _OPERATIONS:
                raise ValueError(f"it asks for the operation {_operation_name(code)}, which no array needs")
            _OPERATIONS[code](self)
        raise ValueError(f"it has more than {MOST_OPERATIONS} operations")

    def _result(self) -> Any:
        if len(self.stack) != 1:
            raise ValueError(f"it ends with {len(self.stack)} values, not one")
        if self._file.tell() != self._size:
            raise ValueError(f"{self._size - self._file.tell()} bytes follow its end")
        return self.stack[0]

    # What the file says next.

    def take(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) < count:
            raise ValueError("the file is cut off")
        return content

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        length = self.number(form)
        if length > LONGEST_NAME:
            raise ValueError(f"a name of {length} bytes; {LONGEST_NAME} are allowed")
        return _decoded(self.take(length))

    def line(self) -> str:
        line = self._file.readline(LONGEST_NAME)
        if not line.endswith(b"\n"):
            raise ValueError(f"a name is cut off, or longer than {LONGEST_NAME} bytes")
        return _decoded(line[:-1])

    def skip(self, form: str) -> StoredBytes:
        """Pass over bytes, remembering where they are."""
        length, offset = self.number(form), self._file.tell()
        if length > self._size - offset:
            raise ValueError(f"it claims {length} bytes where {self._size - offset} are left: cut off or made up")
        self._file.seek(length, 1)
        return StoredBytes(offset, length)

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise ValueError("it takes a value that is not there")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise ValueError("it closes what it never opened")

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def remember(self, index: int | None = None) -> None:
        value = self.pop()
        self._memo[len(self._memo) if index is None else index] = value
        self.push(value)

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"it recalls value {index}, which it never stored")
        self.push(self._memo[index])

    # What builds something.

    def set_items(self, flat: list[Any]) -> None:
        target = self.pop()
        values = target.values if isinstance(target, FrozenDict) else target
        if not isinstance(values, dict) or len(flat) % 2:
            raise ValueError("it fills something that is no dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"a dictionary has a {type(key).__name__.strip('_')} as a key; keys are strings")
            values[key] = value
        self.push(target)

    def find_global(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "something without a name"
        if full not in inert.ALLOWED:
            raise ValueError(f"it names {full!r}, which no checkpoint needs")
        self.push(GlobalName(full))

    def call(self) -> None:
        function, args = self._callable_and_args()
        match function, args:
            case name, (GlobalName(name=kind), (0,), StoredBytes()) if (
                name in inert.RECONSTRUCT and kind == inert.NDARRAY
            ):
                self.push(UnbuiltArray())
            case name, (StoredBytes() as content, NamedDtype() as dtype, tuple() as shape, "C" | "F" as order) if (
                name in inert.FROM_BUFFER
            ):
                self.push(UnbuiltArray(self._stored(content, dtype, shape, fortran=order == "F")))
            case name, (str() as code, bool(), bool()) if name == inert.DTYPE:
                if code not in inert.NUMBERS:
                    raise ValueError(f"arrays of {code!r}; allowed are {', '.join(inert.NUMBERS)}")
                self.push(NamedDtype(code))
            case name, (dict() as values,) if name == inert.FROZEN_DICT:
                self.push(values)
            case _:
                raise ValueError(f"it calls {function!r} as no checkpoint does")

    def new(self) -> None:
        function, args = self._callable_and_args()
        if function in (inert.ADAM, inert.EMPTY, inert.SCHEDULE):
            self.push(InertTuple(function, args))
        elif function == inert.FROZEN_DICT and not args:
            self.push(FrozenDict({}))
        else:
            raise ValueError(f"it makes a {function!r} as no checkpoint does")

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        match target, state:
            case UnbuiltArray(), (
                1,
                tuple() as shape,
                NamedDtype() as dtype,
                bool() as fortran,
                StoredBytes() as content,
            ):
                target.stored = self._stored(content, dtype, shape, fortran=fortran)
            case NamedDtype(), (3, "<" | ">" | "|" | "=" as order, None, None, None, -1, -1, 0):
                target.order = order
            case FrozenDict(), {"_dict": dict() as values} | (None, {"_dict": dict() as values}):
                target.values = values
            case _:
                raise ValueError("it gives something a state that no checkpoint has")
        self.push(target)

    def _callable_and_args(self) -> tuple[str, tuple[Any, ...]]:
        args, function = self.pop(), self.pop()
        if not isinstance(function, GlobalName) or type(args) is not tuple:
            raise ValueError("it calls something that is no function")
        return function.name, args

    def _stored(self, content: StoredBytes, dtype: NamedDtype, shape: tuple[Any, ...], *, fortran: bool) -> StoredArray:
        # Products of sizes may be astronomical, but they are Python's whole numbers: nothing overflows.
        if type(shape) is not tuple or len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array's shape is no short tuple of whole numbers")
        stored = StoredArray(self.path, content.offset, shape, dtype.built(), fortran)
        if stored.nbytes != content.length:
            raise ValueError(
                f"an array of shape {shape} and type {dtype.code} takes {stored.nbytes} bytes, "
                f"the file holds {content.length} for it"
            )
        return stored


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError("a name is not valid UTF-8") from None


def _operation_name(code: bytes) -> str:
    names = [name for name in pickle.__all__ if name.isupper() and getattr(pickle, name) == code]
    return names[0] if names else f"0x{code.hex()}"


def _whole_number(machine: _Machine) -> None:
    length = machine.number("<B")
    if length > 8:
        raise ValueError(f"a whole number of {length} bytes; 8 are allowed")
    machine.push(int.from_bytes(machine.take(length), "little", signed=True))


def _line_global(machine: _Machine) -> None:
    module = machine.line()
    machine.find_global(module, machine.line())


Operation = Callable[[_Machine], object]


def _tuple_of(count: int) -> Operation:
    return lambda machine: machine.push(machine.last(count))


_OPERATIONS: dict[bytes, Operation] = {
    pickle.FRAME: lambda m: m.number("<Q"),
    pickle.MARK: lambda m: m.push(MARK),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: _whole_number,
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text("<B")),
    pickle.BINUNICODE: lambda m: m.push(m.text("<I")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.skip("<B")),
    pickle.BINBYTES: lambda m: m.push(m.skip("<I")),
    pickle.BINBYTES8: lambda m: m.push(m.skip("<Q")),
    pickle.BYTEARRAY8: lambda m: m.push(m.skip("<Q")),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: lambda m: m.set_items(list(m.last(2))),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_to_mark()),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: _tuple_of(1),
    pickle.TUPLE2: _tuple_of(2),
    pickle.TUPLE3: _tuple_of(3),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
    pickle.MEMOIZE: lambda m: m.remember(),
    pickle.BINPUT: lambda m: m.remember(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number("<I")),
    pickle.BINGET: lambda m: m.recall(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
    pickle.GLOBAL: _line_global,
    pickle.STACK_GLOBAL: lambda m: m.find_global(*m.last(2)),
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.new,
    pickle.BUILD: _Machine.build,
}
