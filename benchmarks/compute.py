"""What training costs, counted in forward passes of one sample."""

from __future__ import annotations

from shortcutflow.config import RunConfig

FORWARD_AND_BACKWARD = 3


def evaluations_a_step(config: RunConfig) -> float:
    """Of one training step: 3 a sample for its gradient (forward, and backward as two), and those of its targets."""
    batch = config.training.global_batch_size
    return batch * (FORWARD_AND_BACKWARD + config.objective.target_evaluations(batch))
