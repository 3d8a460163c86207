"""One step: its gradient, and the update that only finite steps make."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shortcutflow.distributed import World
from shortcutflow.objectives import ShortcutObjective
from shortcutflow.optim import OptimizerConfig, build_optimizer
from shortcutflow.train.step import step_if_finite
from shortcutflow.types import LossReport
from tests.backbones_contract.cases import CLASSES, cases

CASES = {case.family: case for case in reversed(list(cases()))}
"""One network of each family."""


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", sorted(CASES))
def test_targets_inside_autocast_cost_no_gradient(family: str, mode: str) -> None:
    """With the weights that are trained (target_weights=current) one module makes targets without a gradient and is
    then called with one. In one block of autocast, which caches its casts of the weights, the gradients must be those
    of targets that were made in a block of their own.
    """
    case = CASES[family]
    network = case.awake()
    net = torch.compile(network, dynamic=False) if mode == "compiled" else network
    data, y = torch.randn((8, *case.shape), generator=seeded()), torch.arange(8) % CLASSES
    objective = ShortcutObjective(finest_steps=4, bootstrap_fraction=0.5)
    gradients = []
    for together in (True, False):
        network.zero_grad()
        if together:
            with torch.autocast("cpu", torch.bfloat16):
                report = objective(net, data, y, generator=seeded())
        else:
            draw = objective.draw(data, generator=seeded())
            with torch.autocast("cpu", torch.bfloat16):
                targets = objective.targets(net, data, y, draw)
            with torch.autocast("cpu", torch.bfloat16):
                report = objective.regress(net, targets)
        report.loss.backward()
        gradients.append([p.grad.clone() if p.grad is not None else None for p in network.parameters()])
    assert any(g is not None and g.abs().max() > 0 for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(loss: float, grad: float) -> tuple[nn.Linear, torch.optim.AdamW, list[LossReport], Tensor]:
    """A network whose gradients all have this value."""
    net = nn.Linear(2, 2)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, grad)
    report: Any = LossReport(loss=torch.tensor(loss), means={}, row_loss=torch.tensor([loss]), targets=None)  # type: ignore[arg-type]
    return net, build_optimizer(net.parameters(), OptimizerConfig(lr=0.1)), [report], torch.tensor(grad)


@pytest.mark.parametrize(("loss", "grad"), [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
@pytest.mark.parametrize("others_bad", [False, True])
def test_weights_and_optimizer_change_in_finite_steps_only(loss: float, grad: float, others_bad: bool) -> None:
    """Also where another rank's numbers are the ones that are not finite."""

    class Two(World):
        def max(self, values: Tensor) -> Tensor:
            return torch.maximum(values, torch.tensor([float(others_bad), 1.0]))

    net, optimizer, reports, grad_norm = made(loss, grad)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    is_bad, stopping = step_if_finite(optimizer, Two(0, 2, torch.device("cpu")), reports, grad_norm, False)
    assert stopping, "the other rank has received a signal"
    assert is_bad == (others_bad or not math.isfinite(loss + grad))
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.equal(old, new) == is_bad
        assert float(optimizer.state[new]["step"]) == (0 if is_bad else 1)
        assert torch.equal(optimizer.state[new]["exp_avg"], torch.zeros_like(new)) == is_bad


def test_the_update_is_launched_before_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a GPU is idle until the host has come back."""
    events: list[str] = []
    _, optimizer, reports, grad_norm = made(1.0, 1.0)
    step, read = optimizer.step, torch.Tensor.tolist
    monkeypatch.setattr(optimizer, "step", lambda: (events.append("step"), step()))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (events.append("read"), read(tensor))[1])
    for wait in ("item", "__bool__", "__float__"):
        method = getattr(torch.Tensor, wait)
        monkeypatch.setattr(torch.Tensor, wait, lambda tensor, m=method, w=wait: (events.append(w), m(tensor))[1])
    step_if_finite(optimizer, World(0, 1, torch.device("cpu")), reports, grad_norm, False)
    assert [event for event in events if event in ("step", "read")] == ["step", "read"]
    assert events.index("step") == 0
