"""A recurrent layer that ``torch.compile`` takes as one piece.

The compiler refuses ``nn.LSTM``, and its decomposition unrolls every token. Behind an operator of its own the layer
runs as it does in eager mode (cuDNN or oneDNN), without a break in the graph; its backward pass runs the layer once
more, since what the kernels keep for themselves cannot cross the operator's border. There is no public way to use
autograd inside an operator, so :func:`_autograd_inside_an_operator` uses three names of ``torch._C``, the only ones in
this package; the contract tests compare a compiled network's gradients with the eager ones and fail if they change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backbones.embeddings import without_autocast


def run_layer(x: Tensor, weights: list[Tensor], mode: str, bidirectional: bool) -> Tensor:
    """As :func:`recurrent_layer`, by PyTorch's own operator, differentiable as usual."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        # Autocast would run cuDNN's layer in float16, whatever type it is set to, and its gradients without a scaler.
        with without_autocast(x):
            return run_layer(x.float(), [w.float() for w in weights], mode, bidirectional)
    state = x.new_zeros(2 if bidirectional else 1, x.shape[0], weights[1].shape[1])
    if mode == "lstm":
        return torch.lstm(x, (state, state), weights, True, 1, 0.0, True, bidirectional, True)[0]
    return torch.gru(x, state, weights, True, 1, 0.0, True, bidirectional, True)[0]


@torch.library.custom_op("backbones::recurrent_layer", mutates_args=())
def recurrent_layer(x: Tensor, weights: list[Tensor], mode: str, bidirectional: bool) -> Tensor:
    """One LSTM or GRU layer from a zero state.

    Args:
        x: (b, n, width).
        weights: input, hidden, input bias, hidden bias of the one direction or of both, in the order of nn.LSTM.
        mode: "lstm" or "gru".
        bidirectional: whether there are two directions.

    Returns:
        (b, n, hidden), or (b, n, 2 hidden) of two directions.
    """
    with torch.no_grad():
        return run_layer(x, weights, mode, bidirectional).contiguous()


@recurrent_layer.register_fake
def _(x: Tensor, weights: list[Tensor], mode: str, bidirectional: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], weights[1].shape[1] * (2 if bidirectional else 1))


def _autograd_inside_an_operator() -> Any:
    """Operators run with autograd excluded by dispatch; this brings it back."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@torch.library.custom_op("backbones::recurrent_layer_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor, weights: list[Tensor], mode: str, bidirectional: bool) -> list[Tensor]:
    with _autograd_inside_an_operator(), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
        out = run_layer(inputs[0], inputs[1:], mode, bidirectional)
        return [g.contiguous() for g in torch.autograd.grad(out, inputs, grad)]


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weights: list[Tensor], mode: str, bidirectional: bool) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, *weights)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, ctx.mode, ctx.bidirectional = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    grad_x, *grads = _backward_op(grad.contiguous(), x, weights, ctx.mode, ctx.bidirectional)
    return grad_x, grads, None, None


recurrent_layer.register_autograd(_backward, setup_context=_setup)
# The type in which the eager layer runs under autocast: cuDNN has no bfloat16 layer in every version, and float32 may
# use TF32 there.
for _device in ("cpu", "cuda"):
    recurrent_layer.register_autocast(_device, torch.float32)
