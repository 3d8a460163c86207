"""The recurrence of the selective scan in plain operations, for graphs that run where this package is not installed."""

from __future__ import annotations

import torch
from torch import Tensor


def scan_by_doubling(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i, y_i = C_i h_i, in log2(n) rounds.

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
