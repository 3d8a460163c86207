"""The former place of :mod:`shortcutflow.optim`, from which recipes import ``OptimizerConfig``."""

from shortcutflow.optim import OptimizerConfig as OptimizerConfig
