"""The objectives a run can name: a closed set, told apart by ``kind``."""

from typing import Annotated

from pydantic import Field

from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.shortcut import ShortcutObjective

ObjectiveConfig = Annotated[ShortcutObjective | FlowMatchingObjective, Field(discriminator="kind")]
