"""Training objectives, told apart by ``kind``: those of this library, and those that other packages add."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shortcutflow.objectives.consistency import ConsistencyDistillationObjective, ConsistencyTrainingObjective
from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.objective import Context, Draw, Objective
from shortcutflow.objectives.progressive_distillation import ProgressiveDistillationObjective
from shortcutflow.objectives.reflow import LiveReflowObjective, ReflowObjective
from shortcutflow.objectives.shortcut import ShortcutObjective

__all__ = [
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
]

ObjectiveConfig = Annotated[
    ShortcutObjective
    | FlowMatchingObjective
    | ConsistencyTrainingObjective
    | ConsistencyDistillationObjective
    | ProgressiveDistillationObjective
    | ReflowObjective
    | LiveReflowObjective,
    Field(discriminator="kind"),
]
