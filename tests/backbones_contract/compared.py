"""Two ways to run a network's training step, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.backbones_contract.cases import Case

Trained = tuple[Tensor, dict[str, Tensor]]


def trained(net: nn.Module, case: Case, call: Callable[..., Any] | None = None) -> Trained:
    """The output, and the gradient of its square mean by each parameter and by x_t."""
    net.zero_grad()
    x_t, *rest = case.inputs()
    x_t.requires_grad_()
    out = (net if call is None else call)(x_t, *rest)
    out.square().mean().backward()
    assert x_t.grad is not None
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return out.detach(), gradients | {"x_t": x_t.grad}


def differences(one: Trained, other: Trained) -> dict[str, float]:
    """Largest difference of the output and of each gradient, relative to the largest number in it."""
    (out, gradients), (expected, expected_gradients) = one, other
    assert gradients.keys() == expected_gradients.keys()
    pairs = {"output": (out, expected)} | {name: (gradients[name], g) for name, g in expected_gradients.items()}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def assert_equal_training(one: Trained, other: Trained, case: Case, tolerance: float = 1e-4) -> None:
    wrong = {name: error for name, error in differences(one, other).items() if not error < tolerance}
    assert not wrong, case
    # Of nothing, all that would be true.
    assert other[0].any()
    assert all(g.any() for g in other[1].values())
    assert len(other[1]) > 5
    halved = other[0], {name: g / 2 for name, g in other[1].items()}
    assert min(list(differences(halved, other).values())[1:]) > 0.4
