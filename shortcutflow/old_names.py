"""Names that configs, checkpoints and scripts of earlier versions use, and what they are called now."""

from __future__ import annotations

import sys
import warnings
from typing import Any

RUN_FIELDS = {"averages": "emas"}
"""Top-level fields of a run's config."""
PUBLIC = {
    "shortcutflow": {"Average": "EMA", "AverageConfig": "EMAConfig"},
    "shortcutflow.ema": {
        "Average": "EMA",
        "AverageConfig": "EMAConfig",
        "PowerAverageConfig": "PowerFunctionEMAConfig",
    },
}
"""Names that scripts and recipes import, by module."""
EVALUATIONS = {
    "pixels": {
        "kind": "protocol", "protocol": "digits", "metrics": ("fid", "label_accuracy"),
        "steps": (1, 2, 4, 8, 32, 128), "samples": 2000,
    },
}  # fmt: skip
"""Kinds of a run's evaluation: what each is now. Fields that a config gives take precedence."""


def renamed_attribute(module: str, name: str) -> Any:
    """The attribute of a module that has this old name; for its ``__getattr__``.

    Raises:
        AttributeError: if the module never had it.
    """
    new = PUBLIC[module].get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now {module}.{new}", DeprecationWarning, stacklevel=3)
    return getattr(sys.modules[module], new)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A run's config with today's names of its fields and kinds."""
    values = {RUN_FIELDS.get(name, name): value for name, value in values.items()}
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and evaluation.get("kind") in EVALUATIONS:
        now = EVALUATIONS[evaluation["kind"]]
        values["evaluation"] = now | evaluation | {"kind": now["kind"]}
    return values


def renamed_path(path: str) -> str:
    """``section.field`` of an override with today's name of its section."""
    section, dot, field = path.partition(".")
    return RUN_FIELDS.get(section, section) + dot + field
