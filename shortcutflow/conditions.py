"""Conditions: what y may be, and the null condition that replaces it.

y is None, labels (b,) int64, a tensor (b, ...), or a mapping of names to such, nested if need be::

    {"tokens": (b, length) int64, "mask": (b, length) bool}

Its first axis counts samples, in every tensor alike. A null condition has the structure of y, one row of it, and
broadcasts: a number for labels (usually num_classes), a tensor, or a mapping of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Condition = Any
"""None, a tensor (b, ...), or a mapping of names to conditions."""
NullCondition = Any
"""None, a number, a tensor, or a mapping of names to null conditions."""


def as_condition(y: Any, device: torch.device | str) -> Condition:
    """y with its tensors on a device; whole numbers (b,) of any type, bool included, become labels, int64.

    Raises:
        ValueError: for what is no tensor, array, list of numbers or mapping of them.
    """
    return _map(lambda leaf: _as_tensor(leaf, device), y)


def _as_tensor(y: Any, device: torch.device | str) -> Tensor:
    if not isinstance(y, Tensor):
        try:
            y = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"y must be None or one tensor (batch, ...), or an array or list of numbers, or a mapping of names to "
                f"such, got {type(y).__name__}"
            ) from error
    return y.to(device, torch.int64 if is_labels(y) else y.dtype)


def is_labels(y: Any) -> bool:
    """Whether y is whole numbers (b,), class labels."""
    return isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point() and not y.is_complex()


def check_rows(y: Condition, rows: int, *, of: str = "data") -> None:
    """Raise ValueError unless every tensor of y has so many rows; ``of`` names what they belong to."""
    for name, leaf in _leaves(y):
        if leaf.shape[:1] != (rows,):
            raise ValueError(
                f"{name} must have one row a sample: {of} has {rows}, {name} has shape {tuple(leaf.shape)}"
            )


def select(y: Condition, rows: slice | Tensor) -> Condition:
    """The rows of y that a slice, an index (n,) or a mask (b,) picks."""
    return _map(lambda leaf: leaf[rows], y)


def concatenate(*ys: Condition) -> Condition:
    """The rows of conditions of one structure, one after the other."""
    return _map(lambda *leaves: torch.cat(leaves), *ys)


def to(y: Condition, device: torch.device | str, *, non_blocking: bool = False) -> Condition:
    """y on a device."""
    return _map(lambda leaf: leaf.to(device, non_blocking=non_blocking), y)


def drop(y: Condition, dropped: Tensor, null_y: NullCondition) -> Condition:
    """y with the rows of ``dropped``, (b,) bool, replaced by the null condition.

    Raises:
        ValueError: without a null condition, or for one of another structure.
    """

    def leaf(y: Tensor, null: Tensor | float) -> Tensor:
        mask = dropped.view(-1, *(1,) * (y.ndim - 1))
        # A number is filled in on y's device: copying it there would hold up an accelerator.
        return torch.where(mask, null.to(y) if isinstance(null, Tensor) else y.new_full((), null), y)

    return _map(leaf, y, require_null(null_y))


def null_like(y: Condition, null_y: NullCondition) -> Condition:
    """The null condition for every row of y.

    Raises:
        ValueError: without a null condition, or for one of another structure.
    """

    def leaf(y: Tensor, null: Tensor | float) -> Tensor:
        return null.to(y).expand_as(y) if isinstance(null, Tensor) else torch.full_like(y, null)

    return _map(leaf, y, require_null(null_y))


def require_null(null_y: NullCondition) -> NullCondition:
    """Return null_y, or raise ValueError saying why one is needed."""
    if null_y is None:
        raise ValueError(
            "dropping conditions and guidance need null_y: the label (usually num_classes) or the row of a condition "
            "that stands for 'no condition'"
        )
    return null_y


def _map(function: Callable[..., Any], y: Any, *others: Any) -> Any:
    """Apply a function to the leaves of y and the matching ones of the others; None stays None."""
    if y is None:
        return None
    if not isinstance(y, Mapping):
        return function(y, *others)
    for other in others:
        if not isinstance(other, Mapping) or other.keys() != y.keys():
            got = sorted(other) if isinstance(other, Mapping) else type(other).__name__
            raise ValueError(
                f"the condition has the parts {sorted(y)}; the null condition must have them too, got {got}"
            )
    return {name: _map(function, leaf, *(other[name] for other in others)) for name, leaf in y.items()}


def _leaves(y: Any, name: str = "y") -> Iterator[tuple[str, Tensor]]:
    if isinstance(y, Mapping):
        for key, leaf in y.items():
            yield from _leaves(leaf, f"{name}[{key!r}]")
    elif y is not None:
        yield name, y
