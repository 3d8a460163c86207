"""The linear layer that sums its bias's gradient sample by sample: F.linear with another order of one sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbones.tokens import TokenLinear, linear_by_sample

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def results(linear: Linear, dtype: torch.dtype, *, autocast: bool) -> list[Tensor]:
    """What it returns, and the gradients of x, weight and bias; 33 samples of 7 tokens."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((33, 7, 8), (16, 8), (16,))]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = F.gelu(linear(*tensors), approximate="tanh")
        out.float().square().mean().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


def compiled(linear: Linear) -> Linear:
    torch._dynamo.reset()
    return torch.compile(linear, fullgraph=True, backend="aot_eager")


def checkpointed(linear: Linear) -> Any:
    def call(*tensors: Tensor) -> Any:
        return checkpoint(linear, *tensors, use_reentrant=False, preserve_rng_state=False)

    return compiled(call)


@pytest.mark.parametrize("how", [lambda linear: linear, compiled, checkpointed])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-2), (torch.bfloat16, False, 1e-2)],
)
def test_it_is_linear(how: Callable[[Linear], Linear], dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    out, of_x, of_weight, of_bias = results(how(linear_by_sample), dtype, autocast=autocast)
    expected = results(F.linear, dtype, autocast=autocast)
    assert torch.equal(out, expected[0])
    assert [g.dtype for g in (of_x, of_weight, of_bias)] == [dtype] * 3
    for mine, other in zip((of_x, of_weight, of_bias), expected[1:], strict=True):
        assert other.abs().max() > 1e-3
        assert (mine - other).abs().max() <= tolerance * other.abs().max()
    exact = results(F.linear, torch.float64, autocast=False)[3]
    mine, theirs = ((g.double() - exact).abs().max() for g in (of_bias, expected[3]))
    assert mine <= 1.5 * theirs + 1e-9, "no less exact than the sum over all rows"


def test_eager_and_without_a_gradient_it_is_the_ordinary_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.tokens.linear_by_sample", lambda *_: pytest.fail("called"))
    layer = TokenLinear(8, 16)
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        torch.compile(layer, backend="eager")(x)
