"""Training objectives, distinguished by ``kind``: those of this library, and those that other packages add."""

from typing import Annotated

from pydantic import SerializeAsAny

from shortcutflow.objectives.consistency import ConsistencyDistillationObjective, ConsistencyTrainingObjective
from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.guided_shortcut import GuidedShortcutObjective
from shortcutflow.objectives.objective import Context, Draw, Objective, add_head
from shortcutflow.objectives.progressive_distillation import ProgressiveDistillationObjective
from shortcutflow.objectives.reflow import LiveReflowObjective, ReflowObjective
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.objectives.two_leg import (
    AlphaFlowObjective,
    LagrangianObjective,
    MeanFlowObjective,
    SoFlowObjective,
    SplitMeanFlowObjective,
)
from shortcutflow.plugins import Kinds

__all__ = [
    "OBJECTIVES",
    "AlphaFlowObjective",
    "ConsistencyDistillationObjective",
    "ConsistencyTrainingObjective",
    "Context",
    "Draw",
    "FlowMatchingObjective",
    "GuidedShortcutObjective",
    "LagrangianObjective",
    "LiveReflowObjective",
    "MeanFlowObjective",
    "Objective",
    "ObjectiveConfig",
    "ProgressiveDistillationObjective",
    "ReflowObjective",
    "ShortcutObjective",
    "SoFlowObjective",
    "SplitMeanFlowObjective",
    "add_head",
]

OBJECTIVES = Kinds("objective", "shortcutflow.objectives", Objective)
ObjectiveConfig = Annotated[SerializeAsAny[Objective], OBJECTIVES]
"""A config's objective, chosen by ``kind``, or an object."""
