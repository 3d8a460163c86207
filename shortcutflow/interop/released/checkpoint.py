"""The released code's checkpoints: what is in them, checked, with every number still in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcutflow.interop.released.inert import ADAM, EMPTY, SCHEDULE, InertTuple
from shortcutflow.interop.released.names import check_names
from shortcutflow.interop.released.restricted_pickle import load
from shortcutflow.interop.released.sizes import Sizes, expected_shapes, read_sizes
from shortcutflow.interop.released.stored_array import StoredArray

TOP = {"train_state", "_timestamp"}
STATE = {"params", "params_ema", "opt_state", "step"}


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """One checkpoint; arrays by flax names joined with '/'.

    Attributes:
        path: of the file.
        sizes: of the network.
        params, params_ema: the weights and their average.
        moments: Adam's mean gradients, None if the file holds no state of Adam.
        step: the released code's count, 1 before the first update.
        timestamp: seconds since 1970 when it was written.
    """

    path: Path
    sizes: Sizes
    params: dict[str, StoredArray]
    params_ema: dict[str, StoredArray]
    moments: dict[str, StoredArray] | None
    step: int
    timestamp: float


def read_released(path: Path) -> ReleasedCheckpoint:
    """Read and check a checkpoint, all but the finiteness of its numbers, which are not read yet.

    Raises:
        ValueError: with one line that says what is wrong with the file.
    """
    value = load(path)
    try:
        return _checked(path, value)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of the released code: {error}") from None


def _checked(path: Path, value: Any) -> ReleasedCheckpoint:
    state = _with_keys("the file", value, TOP)["train_state"]
    _with_keys("train_state", state, STATE)
    timestamp = value["_timestamp"]
    if not isinstance(timestamp, float) or not math.isfinite(timestamp):
        raise ValueError("_timestamp must be a finite number of seconds")
    params, average = (dict(_flat(state[name], name)) for name in ("params", "params_ema"))
    sizes = read_sizes({name: array.shape for name, array in params.items()})
    _check_like(average, "params_ema", sizes)
    for name, array in [*params.items(), *average.items()]:
        if array.dtype.newbyteorder("=") != "float32":
            raise ValueError(f"parameter {name} must be float32, it is {array.dtype}")
    moments = _moments(state["opt_state"], sizes)
    return ReleasedCheckpoint(path, sizes, params, average, moments, _step(state["step"]), timestamp)


def _with_keys(what: str, value: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a dictionary with {', '.join(sorted(keys))}")
    if missing := sorted(keys - set(value)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    if unknown := sorted(set(value) - keys):
        raise ValueError(
            f"{what} has unknown keys {', '.join(map(repr, unknown[:3]))}; it has {', '.join(sorted(keys))}"
        )
    return value


def _flat(tree: Any, what: str, prefix: str = "") -> Iterator[tuple[str, StoredArray]]:
    """Arrays of nested dictionaries by their joined names."""
    if isinstance(tree, StoredArray) and prefix:
        yield prefix, tree
        return
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{what} must hold arrays in nested dictionaries; {prefix or 'it'} is something else")
    for key, part in tree.items():
        # A slash in a key would make two different trees look the same.
        if not key or "/" in key:
            raise ValueError(f"{what} has a key {key!r}; names of parameters are not empty and have no slash")
        yield from _flat(part, what, f"{prefix}/{key}" if prefix else key)


def _check_like(arrays: dict[str, StoredArray], what: str, sizes: Sizes) -> None:
    expected = expected_shapes(sizes)
    try:
        check_names(arrays, set(expected))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{what}: {name} has shape {arrays[name].shape}, in params {shape}")


def _moments(opt_state: Any, sizes: Sizes) -> dict[str, StoredArray] | None:
    """The mean gradients of the one Adam state in nested tuples, checked like its mean squares."""
    found: dict[str, StoredArray] | None = None
    for part in _states(opt_state):
        match part:
            case InertTuple(name, (StoredArray(), mean, square)) if name == ADAM and found is None:
                found = dict(_flat(mean, "opt_state's mu"))
                _check_like(found, "opt_state's mu", sizes)
                _check_like(dict(_flat(square, "opt_state's nu")), "opt_state's nu", sizes)
            case InertTuple(name, (StoredArray(),)) if name == SCHEDULE:
                pass
            case InertTuple(name, ()) if name == EMPTY:
                pass
            case _:
                raise ValueError("opt_state must hold one state of Adam, and empty and schedule states, in tuples")
    return found


def _states(opt_state: Any) -> Iterator[Any]:
    if type(opt_state) is tuple:
        for part in opt_state:
            yield from _states(part)
    else:
        yield opt_state


def _step(value: Any) -> int:
    if isinstance(value, StoredArray) and value.shape == () and value.dtype.kind in "iu":
        value = int(value.read())
    if type(value) is not int or value < 0:
        raise ValueError("step must be a whole number, not negative")
    return value
