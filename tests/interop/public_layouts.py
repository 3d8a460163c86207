"""Networks in the public layouts, written for these tests: the names and the arithmetic of the originals, small.

``PublicTransformer`` has the parameters of SiT's and DiT's checkpoints, and says in plain operations what they compute.
It shares no code with this library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Eps = Callable[[Tensor, Tensor], Tensor]
"""A prediction for z (b, c, h, w) at the times (b,) of a diffusion, labels being fixed."""


class Perceptron(nn.Module):
    """fc1, tanh's approximation of GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


class SelfAttention(nn.Module):
    """Queries, keys and values of all heads from one layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        outputs = []
        for one_q, one_k, one_v in zip(*(part.chunk(self.heads, dim=2) for part in (q, k, v)), strict=True):
            weights = (one_q @ one_k.mT / math.sqrt(one_q.shape[2])).softmax(dim=2)
            outputs.append(weights @ one_v)
        return self.proj(torch.cat(outputs, dim=2))


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(2, keepdim=True)
    x = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    return x * (1 + scale[:, None]) + shift[:, None]


class ModulatedBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(width, heads), Perceptron(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(normed(x, shift, scale))
        return x + mlp_gate[:, None] * self.mlp(normed(x, mlp_shift, mlp_scale))


class PublicTransformer(nn.Module):
    """SiT or DiT: which of them is a matter of what it was trained for."""

    def __init__(
        self, size: int = 8, patch: int = 2, channels: int = 4, width: int = 32, depth: int = 2, heads: int = 2,
        classes: int = 5, doubled: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.channels, self.outputs = patch, channels, channels * (1 + doubled)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(fixed_positions(size // patch, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch**2 * self.outputs)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        randomise(self, seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Of (b, c, h, w), t (b,) and labels (b,): the prediction, without the variance."""
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.y_embedder.embedding_table(y)
        grid = self.x_embedder.proj(x)
        tokens = grid.flatten(2).mT + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        values = self.final_layer.linear(normed(tokens, shift, scale))
        out = torch.empty(len(x), self.outputs, *x.shape[2:])
        for i in range(tokens.shape[1]):
            row, column = (self.patch * k for k in divmod(i, grid.shape[3]))
            patch = values[:, i].view(-1, self.patch, self.patch, self.outputs).permute(0, 3, 1, 2)
            out[:, :, row : row + self.patch, column : column + self.patch] = patch
        return out[:, : self.channels]


def fixed_positions(side: int, width: int) -> Tensor:
    """(side^2, width): sines and cosines of the column, then of the row."""
    table = np.zeros((side * side, width))
    quarter = width // 4
    for i in range(side * side):
        row, column = divmod(i, side)
        for j in range(quarter):
            for part, place in enumerate((column, row)):
                angle = place / 10000 ** (j / quarter)
                table[i, 2 * part * quarter + j] = math.sin(angle)
                table[i, (2 * part + 1) * quarter + j] = math.cos(angle)
    return torch.from_numpy(table).float()


@torch.no_grad()
def randomise(network: nn.Module, seed: int) -> None:
    """Every parameter drawn, also those that start at zero: outputs depend on all."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        if p.requires_grad:
            p.normal_(std=0.2 if p.ndim == 1 else 1 / math.sqrt(p[0].numel()), generator=generator)


def saved(network: nn.Module, path: Path, **beside: Any) -> Path:
    """The file a training script leaves: the state dict, or with others beside it."""
    torch.save({"model": network.state_dict()} | beside if beside else network.state_dict(), path)
    return path


# ---- diffusion, in float64


class Schedule:
    """The linear schedule of 1000 times of DDPM, or other betas."""

    def __init__(self, betas: Any = None) -> None:
        betas = np.linspace(1e-4, 0.02, 1000) if betas is None else np.asarray(betas, dtype=np.float64)
        kept = np.cumprod(1 - betas)
        self.alpha, self.sigma = np.sqrt(kept), np.sqrt(1 - kept)
        self.t = self.alpha / (self.alpha + self.sigma)
        """The flow's time at each of them, falling from near 1 to near 0."""

    def time(self, t: float) -> float:
        """The diffusion's time of the same ratio of noise to data."""
        ratio = np.log(self.sigma / self.alpha)
        asked = np.inf if t == 0 else -np.inf if t == 1 else np.log((1 - t) / t)
        return float(np.interp(asked, ratio, np.arange(len(ratio))))

    def velocity(self, predict: Eps, x: Tensor, t: float, predicts: str = "noise") -> Tensor:
        """x_1 - eps for x_t (b, ...), by the formulas of what is predicted; float64 but for the network."""
        x, r = x.double(), math.hypot(t, 1 - t)
        z = x / r
        out = predict(z.float(), torch.full((len(x),), self.time(t))).double()
        inside = min(max(t, self.t[-1]), self.t[0])
        alpha, sigma = (part / math.hypot(inside, 1 - inside) for part in (inside, 1 - inside))
        eps, data = {
            "noise": lambda: (out, (z - sigma * out) / alpha),
            "v": lambda: (sigma * z + alpha * out, alpha * z - sigma * out),
            "data": lambda: ((z - alpha * out) / sigma, out),
        }[predicts]()
        if t < self.t[-1]:
            return (data - x) / (1 - t)
        if t > self.t[0]:
            return (x - eps) / t
        return data - eps
