"""Flow models as a start: every step size gives what the flow gave, and each can be learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import backbones
from shortcutflow.train.init_from import start_from_flow
from tests.backbones_contract.cases import FIRST, Case, one_of_each_family

STEP_SIZES = (1 / 128, 1 / 16, 0.25, 1.0)
DIT = next(case for case in FIRST if case.family == "dit")


def outputs(net: Any, case: Case) -> list[torch.Tensor]:
    x_t, t, _, y = case.inputs()
    return [net(x_t, t, torch.full_like(t, d), y) for d in STEP_SIZES]


@one_of_each_family
def test_every_step_size_is_that_of_the_flow(case: Case) -> None:
    net = case.awake()
    before = [out.detach() for out in outputs(net, case)]
    assert (before[0] - before[-1]).abs().max() > 1e-4, "before, they differ"
    net.zero_step_embedding(128)
    after = outputs(net, case)
    assert (after[0] - before[0]).abs().max() < 1e-5 * max(1.0, float(before[0].abs().max()))
    assert all(torch.equal(out, after[0]) for out in after)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in outputs(net, case)[::3]).backward()  # type: ignore[union-attr]
        optimizer.step()
    for name, p in net.condition.step.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    now = outputs(net, case)
    assert not torch.equal(now[0], now[-1]), "the step size is let in"


@torch.no_grad()
def test_what_the_flow_was_told() -> None:
    """Another M than the network's own, and networks that were always told 1."""
    case = DIT
    net = case.awake()
    quarter, whole = outputs(net, case)[2:]
    net.zero_step_embedding(4)
    assert (outputs(net, case)[0] - quarter).abs().max() < 1e-5
    ignoring, net = case.awake(ignore_step_size=True), case.awake()
    assert torch.equal(outputs(ignoring, case)[0], whole)
    net.zero_step_embedding(1)
    assert (outputs(net, case)[0] - whole).abs().max() < 1e-5
    with pytest.raises(ValueError, match="built with ignore_step_size=True"):
        ignoring.zero_step_embedding(1)


@torch.no_grad()
def test_an_adapted_network() -> None:
    net = backbones.adapt(nn.Linear(4, 4), shape=(4,), embed=("t", "d"))
    nn.init.normal_(net.out.weight)
    x, t = torch.ones(3, 4), torch.full((3,), 0.5)
    told, other = net(x, t, t / 64), net(x, t, t)
    assert not torch.allclose(told, other)
    net.zero_step_embedding(128)
    assert torch.allclose(net(x, t, t), told, atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear cannot start from a flow: it has no method"):
        start_from_flow(nn.Linear(2, 2), 128)
    for wrong in (0, 100, 2.0):
        with pytest.raises(ValueError, match="must be a power of two"):
            DIT.build().zero_step_embedding(wrong)  # type: ignore[arg-type]
