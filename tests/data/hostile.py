"""Bytes and values that no well-meaning writer made, from seeded generators."""

from __future__ import annotations

import json
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shortcutflow.data.shards import encode_array
from tests.data.test_arrays import header_of, npy
from tests.data.test_damage import Payload

LIMITS = ((signal.ITIMER_PROF, signal.SIGPROF, 5.0), (signal.ITIMER_REAL, signal.SIGALRM, 60.0))
"""Timer, its signal and seconds: of a processor, and in all. A shared machine may stall for some; a deadlock lasts."""


class HangError(BaseException):
    """Not an Exception, so that nothing takes it for a damaged sample."""


@contextmanager
def limited(case: object) -> Iterator[None]:
    """An error that names the case if it takes too long or raises what it must not."""

    def hang(*_: object) -> None:
        (_, _, busy), (_, _, waited) = LIMITS
        raise HangError(f"case {case} took longer than {busy} s of a processor, or {waited} s in all")

    before = {number: signal.signal(number, hang) for _, number, _ in LIMITS}
    for timer, _, seconds in LIMITS:
        signal.setitimer(timer, seconds)
    try:
        yield
    except (ValueError, FileNotFoundError, AssertionError):
        raise
    except Exception as error:
        raise AssertionError(f"case {case}: {type(error).__name__} escaped: {error}") from error
    finally:
        for timer, number, _ in LIMITS:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def peak_memory() -> int:
    """Bytes that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, cut off, emptied, lengthened, blanked, moved, repeated or replaced."""
    if not content:
        return rng.bytes(10)
    out = bytearray(content)
    a, b = sorted(int(i) for i in rng.integers(0, len(out) + 1, 2))
    match int(rng.integers(0, 9)):
        case 0 | 1:
            for place in rng.integers(0, len(out), int(rng.integers(1, 9))):
                out[place] ^= 1 << int(rng.integers(0, 8))
        case 2:
            del out[a:]
        case 3:
            out.clear()
        case 4:
            out += rng.bytes(int(rng.integers(1, 600)))
        case 5:
            out[a:b] = bytes(b - a)
        case 6:
            del out[a:b]
        case 7:
            out[a:a] = out[a:b]
        case 8:
            out[a : a + 4] = (0xFFFFFFFF, 0x7FFFFFFF, 0, 0x80000000)[int(rng.integers(0, 4))].to_bytes(4, "big")
    return bytes(out)


HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**18, 2**63, 10**30, 1e308, -1.5, "", "x", "../x.tar", "/etc/passwd", "pipe:touch x",
    "0" * 64, [], {}, [0], [1, 1, 1], [10**9, 10**9], [3, 30000, 30000], [-1, 2, 2], {"kind": "x"}, "moments", "npy",
    "webp", "float32", "uint8", [[[[]]]], "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
)  # fmt: skip


def with_hostile_value(value: Any, rng: np.random.Generator) -> Any:
    """Something inside it replaced, removed or repeated."""
    hostile = HOSTILE_VALUES[int(rng.integers(0, len(HOSTILE_VALUES)))]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = sorted(value)[int(rng.integers(0, len(value)))]
        if rng.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: with_hostile_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(0, len(value)))
        if rng.random() < 0.1:
            return [*value, value[place]]
        return [with_hostile_value(part, rng) if i == place else part for i, part in enumerate(value)]
    return hostile


def hostile_columns(columns: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    name = sorted(columns)[int(rng.integers(0, len(columns)))]
    column = columns[name]
    match int(rng.integers(0, 8)):
        case 0:
            return {key: value for key, value in columns.items() if key != name}
        case 1:
            new = column.astype([np.float32, np.float64, np.int8, np.bool_, np.uint64][int(rng.integers(0, 5))])
        case 2:
            new = np.full(column.shape, [np.inf, -np.inf, np.nan][int(rng.integers(0, 3))])
        case 3:
            new = column.reshape(*column.shape, 1) if rng.random() < 0.5 else column.reshape(-1)
        case 4:
            new = column[: int(rng.integers(0, len(column)))]
        case 5:
            new = np.full(column.shape, [2**63 - 1, -(2**63), -1, 2**40, 0][int(rng.integers(0, 5))], np.int64)
        case 6:
            new = np.zeros((0, 10**9), np.int64)
        case _:
            new = rng.integers(-(2**63), 2**63 - 1, column.shape, dtype=np.int64)
    return columns | {name: np.ascontiguousarray(new)}


def rewritten_index(content: bytes, rng: np.random.Generator) -> bytes:
    from safetensors.numpy import load, save

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = header["__metadata__"]["shard"]
    columns = load(content)
    if rng.random() < 0.7:
        columns = hostile_columns(columns, rng)
    else:
        described = json.dumps(with_hostile_value(json.loads(described), rng))
        described = described if rng.random() < 0.8 else "[" * 100_000
    return save(columns, {"shard": described})


def hostile_npy(canary: Path) -> list[bytes]:
    """Headers that promise too much, hold code or make parsers stumble."""
    good = encode_array(np.zeros((6, 2)))
    payload = pickle.dumps(Payload(canary))
    objects = npy(np.array([Payload(canary)], object))
    headers = [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 2), 'x': __import__('os').system('touch x')}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (6, 2)}",
        "{'descr': [('a', '<f4')] * 3, 'fortran_order': False, 'shape': (6, 2)}",
        "{'descr': (('<f4', (10**9,)),), 'fortran_order': False, 'shape': (6, 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6L, 3L)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-6, -2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2)}",
        "{'descr': 'x' * 9999, 'fortran_order': False, 'shape': ()}",
        "{1: 2, 'a': 3}", "(" * 200, "-" * 9000 + "1", "[" * 9000, "{" * 90, "'''", '"', "\\", "1\n  2\n 3", "a b c",
        "\0", "f'{1}'", "(6, 2", "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (6, 2)}", "9" * 9000,
        "{'descr': '<V2000000000', 'fortran_order': False, 'shape': (6, 2)}",
    ]  # fmt: skip
    made = [payload, objects, b"\x93NUMPY\x01\x00" + payload, npy(np.zeros((6, 2), np.dtype([("a", "<f4")])))]
    made += [header_of(shape) for shape in ((10**9, 10**9), (2**62, 2), (0, 0), (), (6, 2, 1), (12,))]
    for version in ((1, 0), (2, 0), (3, 0), (9, 9), (0, 0)):
        made.append(good[:6] + bytes(version) + good[8:])
        for header in headers:
            text = header.encode("latin1")
            length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
            made.append(b"\x93NUMPY" + bytes(version) + length + text + bytes(48))
    made += [good[:6] + b"\x02\x00" + b"\xff\xff\xff\xff", good[:8] + b"\xff\xff"]
    return [content for content in made if content != good]
