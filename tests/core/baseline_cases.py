"""The paper's baselines and the later methods, and the networks they are tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from shortcutflow.objectives import (
    AlphaFlowObjective,
    ConsistencyDistillationObjective,
    ConsistencyTrainingObjective,
    LagrangianObjective,
    LiveReflowObjective,
    MeanFlowObjective,
    ProgressiveDistillationObjective,
    ReflowObjective,
    SoFlowObjective,
    SplitMeanFlowObjective,
)
from shortcutflow.types import LossReport, Network
from tests.core.gaussian import Gaussian
from tests.core.networks import Learner, Recorder

ROWS, NULL = 24, 24

BASELINES: dict[str, Any] = {
    "consistency_training": ConsistencyTrainingObjective(finest_steps=16, condition_dropout=0.3),
    "consistency_training_released": ConsistencyTrainingObjective.released(16),
    "consistency_distillation": ConsistencyDistillationObjective(guidance_scale=2, condition_dropout=0.3),
    "consistency_distillation_released": ConsistencyDistillationObjective.released(16),
    "progressive_distillation": ProgressiveDistillationObjective(finest_steps=16, condition_dropout=0.3),
    "progressive_distillation_released": ProgressiveDistillationObjective.released(bootstrap_cfg=True),
    "reflow": ReflowObjective(teacher_steps=3, condition_dropout=0.3, guidance_scale=1.5),
    "reflow_two_rows_per_pair": ReflowObjective(teacher_steps=2, rows_per_pair=2),
    "live_reflow": LiveReflowObjective(reflow_fraction=0.25, generation_steps=3, condition_dropout=0.3),
    "live_reflow_released": LiveReflowObjective.released(bootstrap_every=4, cfg_scale=1.5),
    "live_reflow_without": LiveReflowObjective(reflow_fraction=0),
    "split_mean_flow": SplitMeanFlowObjective(condition_dropout=0.3, adaptive_power=0.5),
    "split_mean_flow_middle": SplitMeanFlowObjective(split="middle", bootstrap_fraction=1),
    "alpha_flow": AlphaFlowObjective(condition_dropout=0.3),
    "soflow": SoFlowObjective(condition_dropout=0.3),
    "mean_flow": MeanFlowObjective(condition_dropout=0.3, bootstrap_fraction=0.5),
    "lagrangian": LagrangianObjective(condition_dropout=0.3, bootstrap_fraction=0.5),
    "two_leg_without": MeanFlowObjective(bootstrap_fraction=0),
}
every_baseline = pytest.mark.parametrize("objective", BASELINES.values(), ids=BASELINES.keys())


def always(d: float, of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Network:
    """A network that makes its step as if it had been told d."""
    return lambda x, t, _, y: of(x, t, torch.full_like(t, d))


def straight(gaussian: Gaussian) -> Network:
    """The flow after reflow: from any x_t on the line from x_0 to its end mu + s x_0, the velocity of that line."""

    def exact(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        t = t.to(x_t.dtype).view(-1, *(1,) * (x_t.ndim - 1))
        noise = (x_t - t * gaussian.mu) / (1 - t + t * gaussian.s)
        return gaussian.mu + (gaussian.s - 1) * noise

    return exact


def asked(objective: Any, progress: float = 0.0) -> tuple[Recorder, Recorder, Recorder, LossReport]:
    """The trained network, the one that makes targets and the teacher, with what they were asked; and the loss."""
    net, average, teacher = (Recorder(Learner(), name) for name in ("net", "average", "teacher"))
    report = objective(
        net, torch.randn(ROWS, 4), torch.arange(ROWS), target_net=average, teacher=teacher, progress=progress,
        null_y=NULL, generator=Generator().manual_seed(0),
    )  # fmt: skip
    return net, average, teacher, report
