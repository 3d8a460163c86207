"""What every backbone promises, whichever its architecture; run over the table in cases.py.

Each promise is a function of a network that is also given one that breaks it: an input ignored, a parameter unused,
samples of a batch mixed, times rounded to bfloat16.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from tests.backbones_contract.cases import (
    CASES,
    CLASSES,
    CONDITION,
    IMAGE,
    SEQUENCE,
    TINY,
    Case,
    cases,
    every_case,
    every_case_with_tensor_condition,
    family_of,
)

Net = Callable[..., Tensor]


def test_every_family_has_its_cases() -> None:
    own = {family_of(name) for name in backbones.BUILDERS}
    assert own <= TINY.keys()
    assert {case.family for case in CASES} == {family_of(name) for name in backbones.names()}


def test_a_network_of_another_package_gets_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a row, for images and for sequences; or for those alone that its builder takes."""
    assert [case.shape for case in CASES if case.name == "thirdparty_conv"] == [IMAGE, SEQUENCE]

    def for_images(*, shape: tuple[int, ...], **options: Any) -> nn.Module:
        if len(shape) != 3:
            raise ValueError("images only")
        return nn.Identity()

    monkeypatch.setitem(backbones.BUILDERS, "other_net", for_images)
    assert [case.shape for case in cases() if case.name == "other_net"] == [IMAGE]


# ---- outputs


@every_case
@pytest.mark.parametrize("batch", [1, 3])
def test_output_has_the_shape_of_x_t(case: Case, batch: int) -> None:
    for net in (case.build(), case.awake()):
        out = net(*case.inputs(batch))
        assert out.shape == (batch, *case.shape)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


def changes(net: Net, case: Case) -> dict[str, float]:
    """How much the output changes, in its own deviations, when one input at a time is replaced by other values."""
    x_t, t, d, y = case.inputs()
    others = {"x_t": x_t.flip(-1), "t": t + 0.25, "d": d / 2, "y": (y + 1) % CLASSES}
    before = net(x_t, t, d, y)
    given = dict(zip(("x_t", "t", "d", "y"), (x_t, t, d, y), strict=True))
    return {
        name: float((net(*(given | {name: value}).values()) - before).abs().mean() / before.std())
        for name, value in others.items()
    }


@every_case
@torch.no_grad()
def test_output_depends_on_every_input(case: Case) -> None:
    net = case.awake()
    assert min(changes(net, case).values()) > 1e-3
    fixed: dict[str, Net] = {
        "x_t": lambda x_t, t, d, y: net(torch.ones_like(x_t), t, d, y),
        "t": lambda x_t, t, d, y: net(x_t, torch.zeros_like(t), d, y),
        "d": lambda x_t, t, d, y: net(x_t, t, torch.ones_like(d), y),
        "y": lambda x_t, t, d, y: net(x_t, t, d, torch.zeros_like(y)),
    }
    for name, ignorant in fixed.items():
        assert changes(ignorant, case)[name] == 0
    x_t, t, d, y = case.inputs()
    assert not torch.allclose(net(x_t, t, d, y), net(x_t, d, t, y)), "t and d have the same effect"


@every_case
@torch.no_grad()
def test_every_step_size_of_the_grid_is_its_own(case: Case) -> None:
    """All of 1/M, 2/M, ..., 1 give different outputs; what lies below 1/M is 1/M, exactly."""
    for finest_steps in (16, 128):
        net, (x_t, t, _, y) = case.awake(finest_steps=finest_steps), case.inputs()

        def at(d: float, net: nn.Module = net, x_t: Tensor = x_t, t: Tensor = t, y: Tensor = y) -> Tensor:
            return net(x_t, t, torch.full_like(t, d), y)

        sizes = [2.0**-k for k in range(finest_steps.bit_length())]
        assert sizes[-1] == 1 / finest_steps
        for one, other in itertools.pairwise(sizes):
            assert (at(one) - at(other)).abs().max() > 1e-4, (one, other)
        for below in (0.0, 1e-6, 0.25 / finest_steps, 0.99 / finest_steps):
            assert torch.equal(at(below), at(1 / finest_steps)), below


def influence_on_others(net: Net, case: Case) -> float:
    """How much a sample's output changes when another sample of the batch does, or leaves; relative."""
    x_t, t, d, y = case.inputs()
    full = net(x_t, t, d, y)
    changed = net(torch.cat([x_t[:1] + 1, x_t[1:]]), torch.cat([t[:1] + 0.1, t[1:]]), d, y)
    alone = torch.cat([net(x_t[i : i + 1], t[i : i + 1], d[i : i + 1], y[i : i + 1]) for i in range(len(x_t))])
    return float(max((full - changed)[1:].abs().max(), (full - alone).abs().max()) / full.std())


@every_case
@torch.no_grad()
def test_samples_do_not_see_each_other(case: Case) -> None:
    net = case.awake()
    assert influence_on_others(net, case) < 1e-4
    assert influence_on_others(lambda x_t, *rest: net(x_t - x_t.mean(0), *rest), case) > 1e-2
    assert influence_on_others(lambda x_t, t, d, y: net(x_t, t.mean().expand_as(t), d, y), case) > 1e-3


# ---- conditions


@every_case
@torch.no_grad()
def test_no_condition_is_the_null_label(case: Case) -> None:
    net, (x_t, t, d, _) = case.awake(), case.inputs()
    null = torch.full((len(x_t),), CLASSES)
    assert torch.equal(net(x_t, t, d, None), net(x_t, t, d, null))
    assert torch.equal(net(x_t, t, d), net(x_t, t, d, null))
    for label in range(CLASSES):
        assert not torch.allclose(net(x_t, t, d, None), net(x_t, t, d, torch.full_like(null, label)))


@every_case
@torch.no_grad()
def test_network_without_labels(case: Case) -> None:
    net, (x_t, t, d, y) = case.awake(num_classes=None), case.inputs()
    assert net(x_t, t, d, None).shape == x_t.shape
    assert torch.equal(net(x_t, t, d), net(x_t, t, d, None))
    with pytest.raises(ValueError, match=r"y must be None"):
        net(x_t, t, d, y)


def tensor_conditions(batch: int = 4) -> Tensor:
    return torch.randn(batch, *CONDITION, generator=torch.Generator().manual_seed(1))


def null_is_zeros(net: Net, case: Case) -> bool:
    """Whether no condition is the condition of zeros, by argument and by default."""
    x_t, t, d, _ = case.inputs()
    zeros = net(x_t, t, d, torch.zeros(4, *CONDITION))
    return torch.equal(net(x_t, t, d, None), zeros) and torch.equal(net(x_t, t, d), zeros)


@every_case_with_tensor_condition
@torch.no_grad()
def test_conditions_that_are_tensors(case: Case) -> None:
    net, (x_t, t, d, _) = case.awake(num_classes=None, condition_shape=CONDITION), case.inputs()
    y = tensor_conditions()
    before = net(x_t, t, d, y)
    assert before.shape == x_t.shape
    for i in range(y[0].numel()):
        changed = y.clone()
        changed.flatten(1)[:, i] += 1
        difference = (net(x_t, t, d, changed) - before).flatten(1).abs().mean(1)
        assert (difference / before.std() > 1e-3).all(), f"number {i} of the condition has no effect"
    # To a sample, its own condition only.
    changed = torch.cat([y[:1] + 1, y[1:]])
    torch.testing.assert_close(net(x_t, t, d, changed)[1:], before[1:], atol=1e-4, rtol=1e-4)
    assert null_is_zeros(net, case)
    ones = torch.ones_like(y)
    assert not null_is_zeros(lambda x_t, t, d, y=None: net(x_t, t, d, ones if y is None else y), case)


@every_case_with_tensor_condition
def test_tensor_conditions_that_are_refused(case: Case) -> None:
    net, (x_t, t, d, labels) = case.build(num_classes=None, condition_shape=CONDITION), case.inputs()
    y = tensor_conditions()
    net(x_t, t, d, y)
    for wrong in (y[:3], y.flatten(1), y.mT, y[..., None], y.long(), labels):
        with pytest.raises(ValueError, match=r"y must be floats of shape \(4, 2, 3\)") as raised:
            net(x_t, t, d, wrong)
        assert str(tuple(wrong.shape)) in str(raised.value)
        assert str(wrong.dtype) in str(raised.value)


@every_case_with_tensor_condition
def test_labels_and_tensors_are_not_mixed(case: Case) -> None:
    with pytest.raises(ValueError, match=r"num_classes \(5\) or condition_shape \(\(2, 3\)\), not both"):
        case.build(condition_shape=CONDITION)


# ---- parameters


def without_gradient(net: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Names of parameters that ask for a gradient and get none, or zero."""
    net.zero_grad()
    net(*inputs).square().mean().backward()
    learnt = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return [name for name, grad in learnt.items() if grad is None or not grad.any() or not grad.isfinite().all()]


@every_case
@pytest.mark.parametrize("num_classes", [CLASSES, None])
def test_every_parameter_gets_a_gradient(case: Case, num_classes: int | None) -> None:
    net, (x_t, t, d, y) = case.awake(num_classes=num_classes).train(), case.inputs()
    inputs = (x_t, t, d, None if num_classes is None else y)
    assert without_gradient(net, inputs) == []
    net.unused = nn.Parameter(torch.ones(3))
    assert without_gradient(net, inputs) == ["unused"]


@every_case_with_tensor_condition
def test_every_parameter_gets_a_gradient_by_a_tensor_condition(case: Case) -> None:
    net = case.awake(num_classes=None, condition_shape=CONDITION).train()
    assert without_gradient(net, (*case.inputs()[:3], tensor_conditions())) == []


@every_case
@torch.no_grad()
def test_state_dict_round_trip(case: Case) -> None:
    net, other, x = case.awake(seed=0), case.awake(seed=1), case.inputs()
    assert not torch.allclose(net(*x), other(*x))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(net(*x), other(*x))


# ---- precision


@every_case
def test_bfloat16_is_finite_and_near(case: Case) -> None:
    net, inputs = case.awake(), case.inputs()
    exact = net(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*inputs)
        loss = out.float().square().mean()
    loss.backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    error = (out.float() - exact).abs().max() / exact.std()
    assert 0 < error < 0.1, "zero would mean that autocast was not in use"


# The second pair is one number in bfloat16.
PAIRS = [(127 / 128, 1.0), (1 - 2**-10, 1.0)]


def told_apart(net: Net, case: Case, name: str, one: float, other: float) -> bool:
    """Whether two values of t or d give different outputs under autocast."""
    x_t, t, d, y = case.inputs()

    def at(value: float) -> Tensor:
        given = {"x_t": x_t, "t": t, "d": d, "y": y} | {name: torch.full_like(t, value)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(*given.values())

    return not torch.equal(at(one), at(other))


@every_case
@pytest.mark.parametrize("name", ["t", "d"])
@torch.no_grad()
def test_autocast_keeps_time_and_step_size_in_float32(case: Case, name: str) -> None:
    net = case.awake()
    for one, other in PAIRS:
        assert told_apart(net, case, name, one, other), (one, other)

    def rounding(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor) -> Tensor:
        return net(x_t, t.bfloat16(), d.bfloat16(), y)

    assert not told_apart(rounding, case, name, *PAIRS[-1])
