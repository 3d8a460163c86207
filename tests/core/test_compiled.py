"""Every objective compiled with its network: no graph break, and the numbers of the objective as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import backbones
import shortcutflow as sf
from shortcutflow.objectives import OBJECTIVES, LagrangianObjective, LiveReflowObjective
from shortcutflow.types import LossReport

ROWS, CLASSES = 16, 3
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "shortcut": [
        {},
        {"guidance_scale": 2.0, "condition_dropout": 0.3, "bootstrap_weight": 4.0, "adaptive_power": 0.5},
        {"flow_of": "teacher", "guidance_scale": 2.0, "condition_dropout": 0.3},
        {"rows": "released", "clip": 4.0},
        {"plug_in_groups": 2, "wavelet_weights": (1.0, 1.0, 2.0), "time_weight": "ramp", "condition_dropout": 0.3},
    ],
    "reflow": [{"teacher_steps": 4}],
    "guided_shortcut": [{"condition_dropout": 0.1, "guided_fraction": 0.5}],
}
"""By kind; what is not named has its default settings."""

EVERY_DAY = ("shortcut-1", "reflow-0")


def cases() -> Iterator[Any]:
    for kind in OBJECTIVES.known():
        if OBJECTIVES.find(kind).__module__.startswith("shortcutflow."):
            for number, settings in enumerate(SETTINGS.get(kind, [{}])):
                name = f"{kind}-{number}"
                marks = [] if name in EVERY_DAY else [pytest.mark.slow]
                yield pytest.param(OBJECTIVES.find(kind)(**settings), id=name, marks=marks)


def network(seed: int, guidance_input: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    net: Any = backbones.create(
        "dit", shape=(1, 4, 4), num_classes=CLASSES, width=16, depth=1, heads=2, patch=2, guidance_input=guidance_input
    )
    with torch.no_grad():
        for parameter in net.parameters():  # also of those that begin as zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def evaluated(objective: Any, progress: float, objective_of_target: int = 1) -> tuple[LossReport, torch.Tensor]:
    guided = objective.kind == "guided_shortcut"
    net, target, teacher = (network(seed, guided) for seed in (0, objective_of_target, 2))
    data = torch.randn(ROWS, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    report = objective(
        net, data, torch.arange(ROWS) % CLASSES, target_net=target, teacher=teacher, progress=progress,
        null_y=CLASSES, generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    report.loss.backward()
    return report, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("objective", [*cases()])
def test_one_graph_and_the_same_numbers(objective: sf.Objective) -> None:
    """Also later in the training, where no compilation is left."""
    torch.compiler.reset()
    compiled = objective.compiled(backend="aot_eager", fullgraph=True, dynamic=False)
    for progress, stance in ((0.4, "default"), (0.41, "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            found, gradient = evaluated(compiled, progress)
        expected, its_gradient = evaluated(objective, progress)
        torch.testing.assert_close(found.targets.v, expected.targets.v, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.row_loss, expected.row_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, its_gradient, rtol=1e-4, atol=1e-6)
        assert found.means.keys() == expected.means.keys()
    other, _ = evaluated(objective, 0.41, objective_of_target=5)
    if objective.kind in ("shortcut", "split_mean_flow", "soflow", "lagrangian", "live_reflow"):
        assert (other.targets.v - expected.targets.v).abs().max() > 1e-3, "control: another network makes the targets"


def test_the_settings_stay_and_are_written_as_before() -> None:
    objective = sf.ShortcutObjective(bootstrap_weight=2.0)
    compiled = objective.compiled(backend="eager")
    assert compiled.model_dump() == objective.model_dump()
    assert type(compiled).model_validate(compiled.model_dump()) == objective


def test_what_no_graph_holds_stays_outside() -> None:
    for objective, held in (
        (sf.ShortcutObjective(), True), (LiveReflowObjective(), False), (LagrangianObjective(), True),
        (LagrangianObjective(derivative="jvp"), False),
    ):  # fmt: skip
        assert ("targets" in objective.compiled(backend="eager")._compiled) == held
        assert "regress" in objective.compiled(backend="eager")._compiled


def test_without_its_regression() -> None:
    """As DistributedDataParallel needs it: the network's call stays outside of the graph."""
    compiled = sf.FlowMatchingObjective().compiled(regress=False, backend="aot_eager", fullgraph=True)
    outside = []
    net = network(0)
    net.register_forward_hook(lambda *_: outside.append(not torch.compiler.is_compiling()))
    data = torch.randn(ROWS, 1, 4, 4)
    compiled(net, data, torch.zeros(ROWS, dtype=torch.int64))
    assert outside == [True]
