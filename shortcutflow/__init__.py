"""shortcutflow: one network, one training run, any number of sampling steps."""

from shortcutflow.ema import Average, AverageConfig
from shortcutflow.objectives.flow_matching import FlowMatchingObjective
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.sampling import Trajectory, draw_noise, sample, trajectory
from shortcutflow.types import Batch, LossReport, Network, Objective, Targets

__version__ = "0.1.0"

__all__ = [
    "Average",
    "AverageConfig",
    "Batch",
    "FlowMatchingObjective",
    "LossReport",
    "Network",
    "Objective",
    "ShortcutObjective",
    "Targets",
    "Trajectory",
    "__version__",
    "draw_noise",
    "sample",
    "trajectory",
]
