"""shortcutflow: one network, one training run, any number of sampling steps."""

from importlib import import_module
from typing import Any

from shortcutflow.ema import EMA, EMAConfig
from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.objective import Context, Draw, Objective
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.old_names import renamed_attribute
from shortcutflow.sampling import Trajectory, draw_noise, invert, sample, trajectory
from shortcutflow.types import Batch, BatchSlice, LossReport, Network, Targets

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Batch",
    "BatchSlice",
    "Context",
    "Draw",
    "EMAConfig",
    "FlowMatchingObjective",
    "LossReport",
    "Network",
    "Objective",
    "ShortcutObjective",
    "Targets",
    "Trajectory",
    "__version__",
    "draw_noise",
    "invert",
    "load",
    "sample",
    "trajectory",
]

load: Any
"""See :func:`shortcutflow.models.model.load`."""


def __getattr__(name: str) -> Any:
    # Loaded at first use: training and sampling alone need no configs and no files of models.
    if name == "load":
        return import_module("shortcutflow.models.model").load
    return renamed_attribute(__name__, name)
