"""Self-attention over tokens, for the token skeleton and the U-Net."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from backbones.embeddings import require_positive


def require_heads(width: int, heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    require_positive(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads must divide width: width {width}, heads {heads}")


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: channels of a token.
        heads: number of heads, contiguous groups of channels.
        scale: factor on the products of queries and keys; None is 1/sqrt(width/heads).

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, scale: float | None = None) -> None:
        super().__init__()
        require_heads(width, heads)
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, queries, keys and values each by themselves; zero biases."""
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        nn.init.zeros_(self.qkv.bias)
        # Each of the three is a square matrix of its own, whose Xavier bound is sqrt(6 / (width + width)).
        bound = math.sqrt(3 / self.qkv.in_features)
        nn.init.uniform_(self.qkv.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) to the same."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width))
