"""Training objectives, told apart by ``kind``: those of this library, and those that other packages add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from inspect import isabstract
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from shortcutflow.objectives.consistency import ConsistencyDistillationObjective, ConsistencyTrainingObjective
from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.objective import Context, Draw, Objective, add_head
from shortcutflow.objectives.progressive_distillation import ProgressiveDistillationObjective
from shortcutflow.objectives.reflow import LiveReflowObjective, ReflowObjective
from shortcutflow.objectives.shortcut import ShortcutObjective

__all__ = [
    "OBJECTIVES",
    "ConsistencyDistillationObjective",
    "ConsistencyTrainingObjective",
    "Context",
    "Draw",
    "FlowMatchingObjective",
    "LiveReflowObjective",
    "Objective",
    "ObjectiveConfig",
    "ProgressiveDistillationObjective",
    "ReflowObjective",
    "ShortcutObjective",
    "add_head",
    "objective_kinds",
]

ENTRY_POINT_GROUP = "shortcutflow.objectives"
OBJECTIVES: tuple[type[Objective], ...] = (
    ShortcutObjective,
    FlowMatchingObjective,
    ConsistencyTrainingObjective,
    ConsistencyDistillationObjective,
    ProgressiveDistillationObjective,
    ReflowObjective,
    LiveReflowObjective,
)
"""Those of this library."""


def objective_kinds() -> dict[str, type[Objective]]:
    """All objectives by kind: this library's, installed packages' and those that the running program has defined.

    A package names its classes by entry points in the group ``shortcutflow.objectives``. So a config can only ever make
    what is there already, never import a module of its choosing.
    """
    found = [entry.load() for entry in entry_points(group=ENTRY_POINT_GROUP)]
    found += [*_subclasses(Objective), *OBJECTIVES]  # type: ignore[type-abstract]
    return {str(cls.model_fields["kind"].default): cls for cls in found if not isabstract(cls)}


def _subclasses(cls: type[Objective]) -> Iterator[type[Objective]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _objective(value: Any) -> Any:
    """The objective that plain values describe, or the one that is given."""
    if not isinstance(value, Mapping | Objective):
        raise ValueError(f"an objective is an object of its class or a mapping with its kind, got {value!r}")
    kind = value.kind if isinstance(value, Objective) else value.get("kind")
    kinds = objective_kinds()
    if kind not in kinds:
        raise ValueError(f"unknown kind of objective {kind!r}; known: {', '.join(sorted(kinds))}")
    if isinstance(value, Mapping):
        return kinds[kind].model_validate(value)
    if type(value) is not kinds[kind]:
        raise ValueError(
            f"{type(value).__name__} has the kind {kind!r} of {kinds[kind].__name__}, which its saved config would "
            "become: give it a kind of its own"
        )
    return value


ObjectiveConfig = Annotated[SerializeAsAny[Objective], BeforeValidator(_objective)]
"""A config's objective, told by ``kind``, or an object."""
