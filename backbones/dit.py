"""DiT: a transformer over patches, conditioned by adaptive layer norm (Peebles & Xie, arXiv 2212.09748).

One file, read from the bottom up: :class:`DiT` is patches -> blocks -> patches, each block modulated by the sum of
the embeddings of t, d and y. ``released=True`` gives the released shortcut code's conventions exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.embeddings import SinusoidalEmbedding, sincos_positions, step_level


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, with x (b, n, w) and shift, scale (b, 1, w); the norm has no weights, eps 1e-6."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: channels of a token.
        heads: number of heads, contiguous groups of channels.
        scale: factor on the products of queries and keys; None is 1/sqrt(width/heads).
    """

    def __init__(self, width: int, heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) to the same."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width))


class Block(nn.Module):
    """Attention, then a perceptron; each normalised, modulated by the condition, and gated onto the residual stream."""

    def __init__(self, width: int, mixer: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.mixer = mixer
        self.mlp = nn.Sequential(
            nn.Linear(width, int(width * mlp_ratio)),
            nn.GELU(approximate="tanh"),
            nn.Linear(int(width * mlp_ratio), width),
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: tokens (b, n, width); c: SiLU of the condition (b, width)."""
        shift_mixer, scale_mixer, gate_mixer, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )
        x = torch.addcmul(x, gate_mixer, self.mixer(modulated_norm(x, shift_mixer, scale_mixer)))
        return torch.addcmul(x, gate_mlp, self.mlp(modulated_norm(x, shift_mlp, scale_mlp)))


class Head(nn.Module):
    """The last modulated norm and the projection to the values of a patch; starts at zero."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(b, n, width) to (b, n, out_width)."""
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.out(modulated_norm(x, shift, scale))


class DiT(nn.Module):
    """A diffusion transformer s(x_t, t, d, y) for images (channels, height, width) or sequences (length, channels).

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        width, depth, heads: size of the transformer.
        patch: side of a patch; must divide height and width (or the length).
        mlp_ratio: hidden size of a block's perceptron over its width.
        ignore_step_size: embed d = 1 whatever d is, as the released code does for its baselines.
        released: the released code's conventions: attention scaled by 1/head size instead of its square root, t
            not multiplied by 1000, blocks' modulation not started at zero, and its unused table of log-variances.

    Raises:
        ValueError: if sizes do not divide, or at a call if x_t, t, d or y do not fit.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int | None = None,
        finest_steps: int = 128,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        mlp_ratio: float = 4.0,
        ignore_step_size: bool = False,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.patch, self.num_classes = tuple(shape), patch, num_classes
        self.finest_steps, self.ignore_step_size = finest_steps, ignore_step_size
        for name, value in (("width", width), ("depth", depth), ("heads", heads), ("num_classes", num_classes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width % heads:
            raise ValueError(f"heads must divide width: width {width}, heads {heads}")
        channels, grid = self._patch_grid()
        self.patch_embedding = nn.Linear(channels * patch ** len(grid), width)
        self.register_buffer("positions", sincos_positions(width, *grid), persistent=False)
        self.time_embedding = SinusoidalEmbedding(width, scale=1.0 if released else 1000.0)
        self.step_embedding = SinusoidalEmbedding(width)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        scale = heads / width if released else None
        self.blocks = nn.ModuleList(Block(width, Attention(width, heads, scale), mlp_ratio) for _ in range(depth))
        self.head = Head(width, channels * patch ** len(grid))
        if released:
            # Nothing reads it; it is there so that the authors' weights load and save completely. The released code
            # starts it at zero and gives it no gradient, so leaving it frozen is what its training does.
            self.log_variances = nn.Parameter(torch.zeros(256, 1), requires_grad=False)
        self._initialise(zero_modulation=not released)

    def _patch_grid(self) -> tuple[int, tuple[int, ...]]:
        """Channels of a sample and the number of patches along each axis."""
        if len(self.shape) not in (2, 3):
            raise ValueError(f"shape must be (channels, height, width) or (length, channels), got {self.shape}")
        channels, sizes = (self.shape[0], self.shape[1:]) if len(self.shape) == 3 else (self.shape[1], self.shape[:1])
        if self.patch < 1 or any(size % self.patch for size in sizes):
            raise ValueError(f"patch must divide the sizes {sizes} of shape {self.shape}, got {self.patch}")
        return channels, tuple(size // self.patch for size in sizes)

    def _initialise(self, *, zero_modulation: bool) -> None:
        """Xavier-uniform weights (queries, keys and values each by themselves), zero biases, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention):
                for weight in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(weight)
            elif isinstance(module, SinusoidalEmbedding):
                nn.init.normal_(module.hidden.weight, std=0.02)
                nn.init.normal_(module.out.weight, std=0.02)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, Block) and zero_modulation:
                nn.init.zeros_(module.modulation.weight)
        for linear in (self.head.modulation, self.head.out):
            nn.init.zeros_(linear.weight)

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None = None) -> Tensor:
        """The average velocity over [t, t + d].

        Args:
            x_t: (b, *shape).
            t, d: (b,) in [0, 1].
            y: labels (b,) int64; None is the null label for every sample.

        Returns:
            (b, *shape), in x_t's dtype or autocast's.
        """
        self._check(x_t, t, d, y)
        c = F.silu(self.condition(t, d, y))
        x = self.patch_embedding(self._to_tokens(x_t)) + self.positions.to(x_t.dtype)
        for block in self.blocks:
            x = block(x, c)
        return self._from_tokens(self.head(x, c))

    def condition(self, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        """The sum of the embeddings of time, step size and label, (b, width)."""
        level = torch.zeros_like(t) if self.ignore_step_size else step_level(d, self.finest_steps)
        c = self.time_embedding(t) + self.step_embedding(level)
        if self.label_embedding is not None:
            null = self.label_embedding.num_embeddings - 1
            labels = torch.full_like(t, null, dtype=torch.int64) if y is None else y
            c = c + self.label_embedding(labels)
        return c

    def _to_tokens(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        return rearrange(x, "b (n p) c -> b n (p c)", p=self.patch)

    def _from_tokens(self, x: Tensor) -> Tensor:
        if len(self.shape) == 3:
            h = self.shape[1] // self.patch
            return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=self.patch, q=self.patch)
        return rearrange(x, "b n (p c) -> b (n p) c", p=self.patch)

    def _check(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> None:
        b = len(x_t)
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"x_t must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x_t.shape)}")
        if t.shape != (b,) or d.shape != (b,):
            raise ValueError(f"t and d must have shape ({b},), got {tuple(t.shape)} and {tuple(d.shape)}")
        if y is not None and self.num_classes is None:
            raise ValueError("this network was built without labels (num_classes=None): y must be None")
        if y is not None and (y.shape != (b,) or y.is_floating_point()):
            raise ValueError(f"y must be whole numbers of shape ({b},), got {y.dtype} {tuple(y.shape)}")
        # Reading values is free on a CPU; an accelerator would have to be waited for.
        if x_t.device.type != "cpu" or torch.compiler.is_compiling() or b == 0:
            return
        for name, value, highest in (("t", t, 1), ("d", d, 1), ("y", y, self.num_classes or 0)):
            if value is not None and not (value.min() >= 0 and value.max() <= highest):
                raise ValueError(
                    f"{name} must lie in [0, {highest}], got {value.min().item():g} to {value.max().item():g}"
                )


_SIZES: dict[str, dict[str, Any]] = {
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
    "xl": {"width": 1152, "depth": 28, "heads": 16},
}

PRESETS: dict[str, Callable[..., nn.Module]] = {"dit": DiT}
"""``dit`` with every size free, and ``dit_{s,b,l,xl}_{2,4,8}``: size and patch of the DiT paper."""

for _size, _options in _SIZES.items():
    for _patch in (2, 4, 8):
        PRESETS[f"dit_{_size}_{_patch}"] = functools.partial(DiT, patch=_patch, **_options)
