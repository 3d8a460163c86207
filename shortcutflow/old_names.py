"""Names that configs, checkpoints and scripts of earlier versions use, and what they are called now."""

from __future__ import annotations

from typing import Any

RUN_FIELDS = {"averages": "emas"}
"""Top-level fields of a run's config."""
PUBLIC = {"Average": "EMA", "AverageConfig": "EMAConfig"}
"""Of the package ``shortcutflow``."""


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A run's config with today's names of its fields."""
    return {RUN_FIELDS.get(name, name): value for name, value in values.items()}


def renamed_path(path: str) -> str:
    """``section.field`` of an override with today's name of its section."""
    section, dot, field = path.partition(".")
    return RUN_FIELDS.get(section, section) + dot + field
