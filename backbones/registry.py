"""Names for builders of networks: this package's own and those of installed packages."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

Builder = Callable[..., nn.Module]

ENTRY_POINT_GROUP = "shortcutflow.backbones"

BUILDERS: dict[str, Builder] = {}
"""Name to builder, of this package and of everything registered while the program runs."""


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator that puts a builder under a name; it goes before one of that name in another installed package.

    >>> @backbones.register("my_net")
    ... def my_net(*, shape, num_classes=None, finest_steps=128, width=64):
    ...     return MyNet(...)

    Raises:
        ValueError: if the name is taken.
    """

    def put(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"backbone {name!r} is registered already, by {BUILDERS[name]!r}")
        BUILDERS[name] = builder
        return builder

    return put


def names() -> list[str]:
    """All names that :func:`create` knows, sorted."""
    found = set(BUILDERS)
    for _, builders in _installed():
        found.update(builders)
    return sorted(found)


def create(name: str, **options: Any) -> nn.Module:
    """Build the network of that name.

    Args:
        name: one of :func:`names`.
        options: for the builder: ``shape`` always, ``num_classes`` for labels, ``finest_steps`` (M), and its own.

    Raises:
        ValueError: for an unknown name, listing the known ones, and for options the builder rejects.
    """
    builder = BUILDERS.get(name)
    if builder is None:
        builder = next((builders[name] for _, builders in _installed() if name in builders), None)
    if builder is None:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown backbone {name!r}; {hint}known: {', '.join(names())}")
    try:
        inspect.signature(builder).bind(**options)
    except TypeError as error:
        raise ValueError(f"backbone {name!r}: {error}; it takes {inspect.signature(builder)}") from error
    return builder(**options)


def _installed() -> Iterator[tuple[EntryPoint, Mapping[str, Builder]]]:
    """The mappings that other packages add."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.value.partition(":")[0] != __name__.partition(".")[0]:
            yield entry, entry.load()
