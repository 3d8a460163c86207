"""What other packages add to this one: found through entry points, and named in a config.

A config from elsewhere can only name what is installed or defined in the running program; nothing is ever imported
because a config gives the name of its module.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


def names(group: str) -> list[str]:
    """Names of the entry points of a group, sorted."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load(group: str, name: str, what: str) -> Any:
    """The object that an installed package declares under a name.

    Args:
        group: of entry points, for example "shortcutflow.loggers".
        name: of the entry point.
        what: it is, for messages: "logger".

    Raises:
        ValueError: for an unknown name, listing the known ones, or a name that two packages declare.
        ImportError: if the package that declares it cannot be imported.
    """
    declared = {entry.value: entry for entry in entry_points(group=group) if entry.name == name}
    only_one(what, name, declared)
    if not declared:
        raise ValueError(unknown(what, name, names(group)))
    (entry,) = declared.values()
    return _load(entry, what)


def load_all(group: str, what: str) -> Iterator[tuple[str, Any]]:
    """Every entry point of a group: its value, "module:object", and the object.

    Raises:
        ImportError: if a package cannot be imported.
    """
    for value, entry in {entry.value: entry for entry in entry_points(group=group)}.items():
        yield value, _load(entry, what)


def _load(entry: EntryPoint, what: str) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{what} {entry.name!r} ({entry.value}) cannot be imported: {error}") from error


def only_one(what: str, name: str, found: Iterable[str]) -> None:
    """Raise ValueError if several places define the same name."""
    if len(places := sorted(set(found))) > 1:
        raise ValueError(f"{what} {name!r} is defined {len(places)} times, by {' and '.join(places)}: rename one")


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that nothing has."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(known) or 'none: no package that has one is installed'}"


@dataclass(frozen=True, eq=False)
class Kinds:
    """The settings classes that one section of a config can hold, each with a ``kind`` of its own.

    As metadata of a field, ``Annotated[SerializeAsAny[Base], Kinds(...)]``, it validates plain values by the class of
    their ``kind``. Known are the subclasses of ``base`` that the running program has defined, those of ``lazy``, and
    those that packages declare in an entry-point group: ``KIND = "module:Class"``.

    Args:
        what: the section holds, for messages: "data source".
        group: of entry points.
        base: of all classes. A subclass declares ``kind: Literal["KIND"] = "KIND"``.
        lazy: classes of this library, as "module:Class" by kind, which are imported at their first use.
    """

    what: str
    group: str
    base: type[BaseModel]
    lazy: Mapping[str, str] = field(default_factory=dict)

    def known(self) -> list[str]:
        """All kinds, sorted."""
        return sorted({*self.lazy, *names(self.group), *(kind for kind, _ in self._defined())})

    def find(self, kind: object) -> type[BaseModel]:
        """The class of a kind.

        Raises:
            ValueError: for an unknown kind, listing the known ones; for one that two classes have; or for an entry
                point whose object is no subclass of base with this kind.
            ImportError: if the package that declares it cannot be imported.
        """
        if not isinstance(kind, str) or kind not in self.known():
            raise ValueError(unknown(f"kind of {self.what}", kind, self.known()))
        if kind in self.lazy:
            EntryPoint(kind, self.lazy[kind], self.group).load()
        elif kind not in dict(self._defined()):
            load(self.group, kind, self.what)
        # A class that is defined twice in one place is a notebook's cell run again: the later one counts.
        found = {_place(each): each for of, each in self._defined() if of == kind}
        only_one(f"kind of {self.what}", kind, found)
        if not found:
            raise ValueError(
                f"the entry point {kind!r} of {self.group} must name a subclass of {self.base.__name__} with "
                f"kind: Literal[{kind!r}] = {kind!r}"
            )
        return next(iter(found.values()))

    def _defined(self) -> Iterator[tuple[str, type[BaseModel]]]:
        for each in _subclasses(self.base):
            if "kind" in inspect.get_annotations(each):
                yield each.model_fields["kind"].default, each

    def _validated(self, value: Any) -> Any:
        if isinstance(value, self.base):
            found = self.find(kind := getattr(value, "kind", None))
            if _place(found) != _place(type(value)):
                raise ValueError(
                    f"{type(value).__name__} would be read back as {found.__name__}, which has its kind {kind!r}: "
                    "give the class a kind of its own"
                )
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.what} must be an object with a kind, got {value!r}; known: {self.known()}")
        return self.find(value.get("kind")).model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Plain values become settings of their kind before anything else looks at them."""
        return core_schema.no_info_before_validator_function(self._validated, handler(source))


def _place(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _subclasses(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)
