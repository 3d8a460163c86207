"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752, section 3.3.2) in plain PyTorch.

    h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i        (width, state), from h = 0
    y_i = C_i h_i + D u_i                                 (width,), then times SiLU(z_i)

:func:`selective_scan` is the fast one, :func:`selective_scan_recurrence` the definition, step by step. Both take what
``selective_scan_fn`` of the package mamba-ssm takes.

How the fast one works. Tokens are cut into chunks of ``STEPS``. Some chunks lie side by side, one to a lane: a loop
over ``STEPS`` positions scans all lanes at once, each from zero; a loop over the lanes hands the state from chunk to
chunk; then every position gets the state that entered its chunk, times the decay since. A decay is exp(delta A) or a
product of such: nothing is divided, and with A < 0 no exponent is positive, so no length and no delta overflows. The
next chunks use the same buffers, which so stay in the processor's cache. The backward pass has the states between
chunks, 1/STEPS of all, and computes those inside again. Channels lie innermost, (batch, lanes, steps, state, width):
there each broadcast is of a scalar or of a contiguous row, and sums over state or width are products of matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

STEPS = 16
"""Tokens of a chunk. Fewer would be more states to keep for the backward pass, more would be more, smaller operations
where only few samples are there to work on side by side."""

_CPU_BUFFER, _DEVICE_BUFFER = 2**21, 2**26
"""Numbers in one of three buffers. On a CPU they are to stay in the cache; a GPU wants few, large operations."""


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """The scan of the module's head, in float32 whatever the inputs or autocast are (float64 for float64).

    Deterministic. One opaque operation to torch.compile, forward and backward (``backbones::selective_scan``), besides
    what depends on D, z and the bias. Fastest where u, delta, B and C are transposed views of (b, n, ...). FLOPs by
    torch.utils.flop_counter: 9 b n width state forward, as Mamba's authors count, and twice that back.

    In forward mode (torch.func.jvp) it is :func:`selective_scan_recurrence`, with one step a token, as the operation
    has no tangents. Second derivatives and torch.func.grad raise; the recurrence has them too.

    Args:
        u, delta: (b, width, n).
        A: (width, state), real, below zero.
        B, C: (b, state, n).
        D: (width,); None is 0.
        z: (b, width, n); None leaves out the gate.
        delta_bias: (width,), added to delta.
        delta_softplus: softplus of delta, after its bias.

    Returns:
        (b, width, n), in u's dtype.

    Raises:
        ValueError: if shapes do not fit.
    """
    # Without this the operation would drop tangents and raise nothing: PyTorch treats it as a constant.
    if any(x is not None and unpack_dual(x).tangent is not None for x in (u, delta, A, B, C, D, z, delta_bias)):
        return selective_scan_recurrence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    _check(u, delta, A, B, C, z)
    wide, step, matrix, into, out_of = _prepared(u, delta, A, B, C, delta_bias, delta_softplus)
    given = wide.mT, step.mT, matrix.T, into.mT, out_of.mT
    # An exported graph runs where the operator is not installed.
    y = scan_by_doubling(*given) if torch.compiler.is_exporting() else _forward(*given)[0]
    return _gated(y.mT, wide, D, z).to(u.dtype)


def selective_scan_recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """What :func:`selective_scan` computes, a token at a time: slow, and differentiable in every mode and order."""
    _check(u, delta, A, B, C, z)
    wide, step, matrix, into, out_of = _prepared(u, delta, A, B, C, delta_bias, delta_softplus)
    h = wide.new_zeros(len(u), *A.shape)
    y = []
    for i in range(u.shape[-1]):
        inflow = (step[:, :, i] * wide[:, :, i]).unsqueeze(-1) * into[:, None, :, i]
        h = torch.exp(step[:, :, i, None] * matrix) * h + inflow
        y.append((h * out_of[:, None, :, i]).sum(-1))
    return _gated(torch.stack(y, dim=-1), wide, D, z).to(u.dtype)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> None:
    b, width, n = u.shape
    for name, given, shape in (
        ("delta", delta, (b, width, n)), ("A", A, (width, A.shape[-1])), ("B", B, (b, A.shape[-1], n)),
        ("C", C, (b, A.shape[-1], n)), ("z", u if z is None else z, (b, width, n)),
    ):  # fmt: skip
        if given.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside u of {(b, width, n)}, got {tuple(given.shape)}")


def _prepared(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, ...]:
    """u, delta, A, B, C in the dtype of the scan, with delta's bias and softplus."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        delta = F.softplus(delta)
    return u.to(dtype), delta, A.to(dtype), B.to(dtype), C.to(dtype)


def _gated(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) SiLU(z)."""
    if D is not None:
        y = torch.addcmul(y, u, D.to(u.dtype).unsqueeze(-1))
    return y if z is None else y * F.silu(z.to(u.dtype))


# ---- the recurrence alone, tokens before channels


@torch.library.custom_op("backbones::selective_scan", mutates_args=())
def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """u, delta (b, n, width), A (state, width), B, C (b, n, state), all of one dtype.

    Returns:
        y (b, n, width), and the state before each chunk and the one after the last, (b, chunks + 1, state, width).
    """
    y = u.new_empty(u.shape)
    states = u.new_empty(_states_shape(u, A))
    samples, lanes = _blocks(u, A)
    with torch.autocast(u.device.type, enabled=False):
        for rows in (slice(i, i + samples) for i in range(0, len(u), samples)):
            given = [x[rows].contiguous() for x in (u, delta, B, C)]
            _forward_block(given, A.contiguous(), y[rows], states[rows], lanes)
    return y, states


@torch.library.custom_op("backbones::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, each of its own shape; inputs and states as of :func:`_forward`."""
    grads = [x.new_empty(x.shape) for x in (u, delta, B, C)]
    grad_A = A.new_zeros(A.shape)
    samples, lanes = _blocks(u, A)
    with torch.autocast(u.device.type, enabled=False):
        for rows in (slice(i, i + samples) for i in range(0, len(u), samples)):
            given = [x[rows].contiguous() for x in (u, delta, B, C, grad_y)]
            _backward_block(given, A.contiguous(), states[rows], [grad[rows] for grad in grads], grad_A, lanes)
    grad_u, grad_delta, grad_B, grad_C = grads
    return grad_u, grad_delta, grad_A, grad_B, grad_C


def _states_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    return len(u), (u.shape[1] + STEPS - 1) // STEPS + 1, A.shape[0], A.shape[1]


def _blocks(u: Tensor, A: Tensor) -> tuple[int, int]:
    """How many samples, and how many chunks of each, are worked on side by side: two chunks or more."""
    pieces = max(2, (_CPU_BUFFER if u.device.type == "cpu" else _DEVICE_BUFFER) // (STEPS * A.numel()))
    samples = max(1, min(len(u), pieces // 2))
    return samples, pieces // samples


def _groups(n: int, lanes: int) -> list[tuple[slice, slice, tuple[int, int]]]:
    """Cuts n tokens into groups of chunks: tokens, chunks, (lanes, steps). What is left over is a lane by itself."""
    whole = n // STEPS
    pieces = [(chunk, min(lanes, whole - chunk), STEPS) for chunk in range(0, whole, lanes)]
    if n % STEPS:
        pieces.append((whole, 1, n % STEPS))
    return [
        (slice(chunk * STEPS, chunk * STEPS + lane * steps), slice(chunk, chunk + lane), (lane, steps))
        for chunk, lane, steps in pieces
    ]


def _buffers(count: int, u: Tensor, A: Tensor, lanes: int) -> list[Tensor]:
    """Flat buffers, each for the largest (b, lanes, steps, state, width)."""
    return [u.new_empty(len(u) * min(u.shape[1], lanes * STEPS) * A.numel()) for _ in range(count)]


def _decay(delta: Tensor, A: Tensor, out: Tensor) -> None:
    """exp(delta A), as a power of two: PyTorch's CPU kernels take less than half the time for one."""
    torch.mul(delta, A * math.log2(math.e), out=out).exp2_()


def _forward_block(given: list[Tensor], A: Tensor, y: Tensor, states: Tensor, lanes: int) -> None:
    """Fills y and states for a few samples; given: u, delta, B, C, shapes as of :func:`_forward`."""
    u, delta, B, C = given
    inflow = delta * u
    buffers = _buffers(2, u, A, lanes)
    states[:, 0] = 0
    for tokens, chunks, rows in _groups(u.shape[1], lanes):
        step, flow, into = (x[:, tokens].unflatten(1, rows) for x in (delta, inflow, B))
        shape = (len(u), *rows, *A.shape)
        decay, h = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        _decay(step.unsqueeze(-2), A, decay)
        torch.mul(into.unsqueeze(-1), flow.unsqueeze(-2), out=h)
        for i in range(1, rows[1]):
            h[:, :, i].addcmul_(decay[:, :, i], h[:, :, i - 1])
            decay[:, :, i].mul_(decay[:, :, i - 1])  # from here on since the start of the chunk
        for lane, chunk in enumerate(range(chunks.start, chunks.stop)):
            torch.addcmul(h[:, lane, -1], decay[:, lane, -1], states[:, chunk], out=states[:, chunk + 1])
        h.addcmul_(decay, states[:, chunks].unsqueeze(2))
        y[:, tokens] = torch.matmul(C[:, tokens].unsqueeze(-2), h.flatten(1, 2)).squeeze(-2)


def _backward_block(
    given: list[Tensor], A: Tensor, states: Tensor, grads: list[Tensor], grad_A: Tensor, lanes: int
) -> None:
    """Fills the gradients of u, delta, B, C for a few samples, adds to A's; given: u, delta, B, C, y's gradient."""
    u, delta, B, C, grad_y = given
    grad_u, grad_delta, grad_B, grad_C = grads
    inflow = delta * u
    buffers = _buffers(3, u, A, lanes)
    handed = u.new_empty(len(u), lanes, *A.shape)
    carry = torch.zeros_like(handed[:, 0])
    for tokens, chunks, rows in reversed(_groups(u.shape[1], lanes)):
        step, flow, into, out_of, gy = (x[:, tokens].unflatten(1, rows) for x in (delta, inflow, B, C, grad_y))
        shape = (len(u), *rows, *A.shape)
        decay, kept, h = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        # The states again: kept = exp(delta A) h_{i-1}, and h = kept + delta B u.
        _decay(step.unsqueeze(-2), A, decay)
        before = states[:, chunks]
        for i in range(rows[1]):
            torch.mul(decay[:, :, i], before, out=kept[:, :, i])
            torch.addcmul(kept[:, :, i], into[:, :, i, :, None], flow[:, :, i, None], out=h[:, :, i])
            before = h[:, :, i]
        # A row times a matrix: as a matrix times a column it takes ten times as long on a CPU.
        grad_C[:, tokens] = torch.matmul(gy.unsqueeze(-2), h.mT).squeeze(-2).flatten(1, 2)
        g = torch.mul(out_of.unsqueeze(-1), gy.unsqueeze(-2), out=h)
        _scan_back(g, decay, handed[:, : rows[0]], carry)
        grad_B[:, tokens] = torch.matmul(flow.unsqueeze(-2), g.mT).squeeze(-2).flatten(1, 2)
        grad_u[:, tokens] = torch.matmul(into.unsqueeze(-2), g).squeeze(-2).flatten(1, 2)
        kept.mul_(g)  # the gradient of the exponent delta A
        grad_delta[:, tokens] = torch.mul(kept, A, out=h).sum(-2).flatten(1, 2)
        grad_A += kept.mul_(step.unsqueeze(-2)).sum((0, 1, 2))
    grad_delta.addcmul_(grad_u, u)  # grad_u is that of the inflow so far
    grad_u.mul_(delta)


def _scan_back(g: Tensor, decay: Tensor, handed: Tensor, carry: Tensor) -> None:
    """The gradients of all states from their direct ones, in place: g_i = g_i + decay_{i+1} g_{i+1}.

    Args:
        g, decay: (b, lanes, steps, state, width).
        handed: (b, lanes, state, width), room to work in.
        carry: (b, state, width); what the later group hands to this one's last state, then what this one hands on.
    """
    lanes, steps = g.shape[1:3]
    for i in range(steps - 2, -1, -1):
        g[:, :, i].addcmul_(decay[:, :, i + 1], g[:, :, i + 1])
    torch.mul(decay[:, :, 0], g[:, :, 0], out=handed)
    for i in range(steps - 2, -1, -1):
        decay[:, :, i].mul_(decay[:, :, i + 1])  # from here on until the end of the chunk
    for lane in range(lanes - 1, -1, -1):
        g[:, lane, -1] += carry
        if steps > 1:
            g[:, lane, :-1].addcmul_(decay[:, lane, 1:], carry.unsqueeze(1))
        torch.addcmul(handed[:, lane], decay[:, lane, 0], carry, out=carry)


@_forward.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(_states_shape(u, A))


@_backward.register_fake
def _(grad_y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (u, delta, A, B, C))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)  # the states' gradient would be as many zeros as there are states


def _gradients(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None,) * 5 if grad_y is None else _backward(grad_y, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.backbones.selective_scan)
def _flops(u: torch.Size, delta: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    return 9 * math.prod(u) * A[0]


@register_flop_formula(torch.ops.backbones.selective_scan_backward)
def _flops_back(grad_y: torch.Size, u: torch.Size, delta: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    return 18 * math.prod(u) * A[0]


def scan_by_doubling(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence in plain operations, for graphs that run where this package is not installed.

    h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i, y_i = C_i h_i, in log2(n) rounds.

    After the round with distance s, each position holds what the last 2 s tokens left in it, and their decay. All
    states are in memory at once, (b, n, state, width); nothing is divided, so nothing overflows with A < 0.

    Args:
        u, delta: (b, n, width).
        A: (state, width), below zero.
        B, C: (b, n, state).

    Returns:
        y, (b, n, width).
    """
    h = (delta * u).unsqueeze(-2) * B.unsqueeze(-1)
    decay = torch.exp(delta.unsqueeze(-2) * A)
    distance = 1
    while distance < u.shape[1]:
        late, early = slice(distance, None), slice(None, -distance)
        h = torch.cat([h[:, :distance], torch.addcmul(h[:, late], decay[:, late], h[:, early])], dim=1)
        decay = torch.cat([decay[:, :distance], decay[:, late] * decay[:, early]], dim=1)
        distance *= 2
    return torch.matmul(C.unsqueeze(-2), h).squeeze(-2)
