"""``section.field=value`` on a command line: a config with some of its values changed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args

from pydantic import BaseModel

from shortcutflow import plugins
from shortcutflow.config.evaluation import EVALUATIONS
from shortcutflow.config.run import RunConfig, validated
from shortcutflow.coupling import TransportCoupling
from shortcutflow.data import DATA_SOURCES
from shortcutflow.ema import AnyEMAConfig
from shortcutflow.objectives import OBJECTIVES
from shortcutflow.old_names import renamed_path

OPEN_SECTIONS = {"data": DATA_SOURCES, "objective": OBJECTIVES, "evaluation": EVALUATIONS}
"""Sections of a run whose kinds other packages can add to."""


def with_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """A config with ``section.field=value`` applied; values are JSON, or else taken as text.

    A new ``kind`` of a section keeps the fields that both kinds have and gives the others their defaults.

    Raises:
        ValueError: for an override without "=", an unknown field (naming those there are), or an impossible value.
    """
    values = config.model_dump(mode="json")
    # A kind comes first: which fields a section has depends on it.
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".kind")):
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"an override has the form section.field=value, got {override!r}")
        _set(values, renamed_path(path), text)
    return validated(values, where="config")


def _set(values: dict[str, Any], path: str, text: str) -> None:
    *sections, field = path.split(".")
    here = values
    for i, section in enumerate(sections):
        if here.get(section, {}) is None and _kinds_of(sections[: i + 1]) is not None:
            if field != "kind":
                raise ValueError(f"{path!r}: {section} is null; give {section}.kind=... beside it")
            here[section] = {"kind": None}
        if not isinstance(here.get(section), dict):
            raise ValueError(_unknown(path, ".".join([*sections[:i], section]), here, sections[:i]))
        here = here[section]
    free_form = bool(sections) and sections[-1] in ("options", "emas")
    kinds = _kinds_of(sections)
    # A section that has changed its kind lacks the fields that have no default.
    fields = kinds(here["kind"]).model_fields if kinds is not None and here.get("kind") is not None else {}
    if field not in here and not free_form and field not in fields:
        raise ValueError(_unknown(path, field, here | fields, sections))
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if field == "kind" and kinds is not None and value != here.get("kind"):
        # What the new kind of a section also has is kept; the rest gets its defaults.
        new = kinds(value).model_fields
        for name in here.keys() - new.keys():
            del here[name]
    here[field] = value


def _unknown(path: str, field: str, here: dict[str, Any], sections: list[str]) -> str:
    close = difflib.get_close_matches(field.rpartition(".")[2], list(here), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{path!r}: {'.'.join(sections) or 'a run'} has no field {field!r}; {hint}it has: {', '.join(here)}"


def _kinds_of(sections: list[str]) -> Callable[[object], type[BaseModel]] | None:
    """Finds the settings class of a kind, for a section or an EMA that has kinds; None for any other."""
    if len(sections) == 1 and sections[0] in OPEN_SECTIONS:
        return OPEN_SECTIONS[sections[0]].find
    if sections == ["coupling"]:
        return partial(_kind_among, "coupling", (TransportCoupling,))
    if len(sections) == 2 and sections[0] == "emas":
        return partial(_kind_among, "kind of EMA", get_args(AnyEMAConfig))
    return None


def _kind_among(what: str, classes: Iterable[type[BaseModel]], kind: object) -> type[BaseModel]:
    known = {each.model_fields["kind"].default: each for each in classes}
    if kind not in known:
        raise ValueError(plugins.unknown(what, kind, known))
    return known[kind]
