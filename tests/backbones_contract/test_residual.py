"""The option ``round_residual``: what it changes under autocast, and that it changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones.tokens import modulated_norm
from tests.backbones_contract.cases import CASES, IMAGE, TINY, Case, params
from tests.backbones_contract.compared import differences, trained

TOKEN_FAMILIES = [case for case in CASES if case.family in ("dit", "lstm", "mamba", "transformer")]


def streams(net: Any, case: Case) -> set[torch.dtype]:
    """Types of what goes into each block."""
    seen: set[torch.dtype] = set()
    hooks = [block.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype)) for block in net.blocks]
    with torch.autocast("cpu", torch.bfloat16):
        net(*case.inputs())
    for hook in hooks:
        hook.remove()
    return seen


@params(TOKEN_FAMILIES)
def test_the_stream_is_rounded_under_autocast_alone(case: Case) -> None:
    exact, rounded = case.awake(), case.awake(round_residual=True)
    assert streams(exact, case) == {torch.float32}
    assert streams(rounded, case) == {torch.bfloat16}
    inputs = case.inputs()
    with torch.no_grad():
        whole = exact(*inputs)
        assert torch.equal(rounded(*inputs), whole)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [float((net(*inputs) - whole).square().mean().sqrt()) for net in (exact, rounded)]
    assert 0 < errors[1] != errors[0]
    assert errors[1] < 3 * errors[0], "of two blocks"


def test_gradients_of_a_rounded_stream_stay_close() -> None:
    """To those of float32, about as close as autocast's are without it."""
    case = Case("dit", IMAGE, TINY["dit"].options)
    whole = trained(case.awake(), case)
    with torch.autocast("cpu", torch.bfloat16):
        worst = [max(differences(trained(case.awake(round_residual=r), case), whole).values()) for r in (False, True)]
    assert worst[0] < 0.1
    assert worst[1] < 2 * worst[0] + 0.02


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_norms_of_a_rounded_stream_are_float32(mean: float) -> None:
    """A mean of 30 that was itself rounded to bfloat16 would be off by up to 0.06, of a deviation of 1."""
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 64) + mean).bfloat16().requires_grad_()
    shift, scale = torch.zeros(2, 1, 64), torch.zeros(2, 1, 64)
    exact = nn.functional.layer_norm(x.detach().double(), (64,), eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        normed: Tensor = modulated_norm(x, shift.bfloat16(), scale.bfloat16())
    assert normed.dtype == torch.float32
    assert (normed - exact).abs().max() < 1e-4
