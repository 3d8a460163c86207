"""Configs of runs: their sections, and overrides from a command line."""

from shortcutflow.config.evaluation import EVALUATIONS, EvaluationSettings
from shortcutflow.config.overrides import with_overrides
from shortcutflow.config.run import CONFIG_FILE, CURRENT, RunConfig, check_rows, validated
from shortcutflow.config.training import TrainingConfig

__all__ = [
    "CONFIG_FILE",
    "CURRENT",
    "EVALUATIONS",
    "EvaluationSettings",
    "RunConfig",
    "TrainingConfig",
    "check_rows",
    "validated",
    "with_overrides",
]
