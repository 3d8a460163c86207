"""Embeddings of time, step size and position, shared by all backbones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SinusoidalEmbedding(nn.Module):
    """A scalar a sample as a vector: cosines and sines of many frequencies, then a two-layer perceptron.

    Features (cos, sin)(scale value 10000^(-i/128)), i < 128 (as DiT and the released code). Features and perceptron
    stay float32 under autocast: bfloat16 cannot tell 511/512 from 1.

    Args:
        width: size of the embedding.
        scale: factor on the value. 1000 spreads t in [0, 1] over the frequencies; the released code has 1.
        features: number of cosines and sines together.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1.0, features: int = 256) -> None:
        super().__init__()
        half = features // 2
        self.register_buffer(
            "frequencies", scale * torch.exp(-math.log(10000) * torch.arange(half) / half), persistent=False
        )
        self.hidden = nn.Linear(features, width)
        self.out = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        """(b,) to (b, width)."""
        with torch.autocast(value.device.type, enabled=False):
            angle = value.float()[:, None] * self.frequencies
            features = torch.cat([angle.cos(), angle.sin()], dim=-1)
            return self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def step_level(d: Tensor, finest_steps: int) -> Tensor:
    """The step size on the scale the released code embeds: log2(1/d), 0 for d = 1 and log2(M) for d at or below 1/M."""
    return -torch.log2(d.float().clamp(min=1 / finest_steps))


def sincos_positions(width: int, *sizes: int) -> Tensor:
    """Fixed sine-cosine position embedding of a 1-D or 2-D grid, (tokens, width), row-major.

    In two dimensions the first half of the channels encodes the column, the second the row; within each part the sines
    come first, frequencies 10000^(-i/n).

    Raises:
        ValueError: if width does not divide into sines and cosines of each axis.
    """
    if width % (2 * len(sizes)):
        raise ValueError(f"width must be a multiple of {2 * len(sizes)} for {len(sizes)}-D positions, got {width}")
    part = width // len(sizes)
    omega = 10000.0 ** (-torch.arange(part // 2, dtype=torch.float64) / (part // 2))
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
    parts = []
    for axis in reversed(grid):
        angle = axis.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
