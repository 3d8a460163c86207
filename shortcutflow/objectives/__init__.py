"""The objectives a run can name: a closed set, told apart by ``kind``."""

from typing import Annotated

from pydantic import Field

from shortcutflow.objectives.consistency_distillation import ConsistencyDistillationObjective
from shortcutflow.objectives.consistency_training import ConsistencyTrainingObjective
from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.live_reflow import LiveReflowObjective
from shortcutflow.objectives.progressive_distillation import ProgressiveDistillationObjective
from shortcutflow.objectives.reflow import ReflowObjective
from shortcutflow.objectives.shortcut import ShortcutObjective

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
