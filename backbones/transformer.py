"""Transformer: the token skeleton with the blocks of x-transformers (an optional package).

What its blocks have and DiT's have not: rotary positions (along the flattened tokens), RMSNorm, normalised queries and
keys. What they lack: the condition only scales (no shift), and gates start at sigmoid(-2) = 0.12 instead of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.attention import require_heads
from backbones.tokens import SIZES, TokenNetwork, presets, xavier


class XBlock(nn.Module):
    """One layer of x-transformers' encoder: attention and MLP with adaptive RMSNorm and layer scale.

    Raises:
        ImportError: if x-transformers is not installed.
        ValueError: if the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        require_heads(width, heads)
        try:
            # Takes 3 seconds to load, so only a transformer pays for it.
            from x_transformers import Encoder
        except ImportError as error:
            raise ImportError(
                "the transformer backbone is made of x-transformers' blocks: pip install 'shortcutflow[transformer]'"
            ) from error
        self.layer = Encoder(
            dim=width, depth=1, heads=heads, attn_dim_head=width // heads, ff_mult=mlp_ratio,
            rotary_pos_emb=True, attn_qk_norm=True, attn_flash=True,
            use_adaptive_rmsnorm=True, use_adaptive_layerscale=True, dim_condition=width,
            pre_norm_has_final_norm=False, verbose=False,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Xavier-uniform weights; norms that scale by 1 and gates of 0.12, whatever the condition."""
        for name, module in self.layer.named_modules():
            if name.endswith("to_gamma") and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.constant_(module.bias, -2.0)
            else:
                xavier(module)
        inv_freq: Any = self.layer.rotary_pos_emb.inv_freq
        half = torch.arange(len(inv_freq), device=inv_freq.device) / len(inv_freq)
        inv_freq.copy_(10000.0**-half)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: tokens (b, n, width); c: SiLU of the condition (b, width)."""
        return self.layer(x, condition=c)


class Transformer(TokenNetwork):
    """x-transformers' encoder as a shortcut model s(x_t, t, d, y) for images or sequences.

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        condition_shape: shape of a sample's condition tensor, instead of labels; zeros are the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        width, depth, heads: size of the transformer.
        patch: side of a patch; must divide height and width, or the length. None is 2 for images, 1 for sequences.
        mlp_ratio: hidden size of a block's MLP over its width.
        guidance_input: take the guidance scale as an input, see :class:`backbones.embeddings.Condition`.
        round_residual: see :class:`backbones.tokens.TokenNetwork`.

    Raises:
        ImportError: if x-transformers is not installed.
        ValueError: if sizes do not divide, or at a call if x_t, t, d or y do not fit.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        num_classes: int | None = None,
        condition_shape: Sequence[int] | None = None,
        finest_steps: int = 128,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int | None = None,
        mlp_ratio: float = 4.0,
        guidance_input: bool = False,
        round_residual: bool = False,
    ) -> None:
        super().__init__(
            lambda: XBlock(width, heads, mlp_ratio),
            shape=shape, num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            width=width, depth=depth, patch=patch, guidance_input=guidance_input,
            round_residual=round_residual,
        )  # fmt: skip
        self.reset_parameters()


PRESETS = presets("transformer", Transformer, {size: SIZES[size] for size in ("s", "b")})
"""``transformer`` with every size free; ``transformer_{s,b}`` as DiT's, ``transformer_{s,b}_{2,4,8}`` with a patch."""
