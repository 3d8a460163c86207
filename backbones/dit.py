"""DiT: the token skeleton with self-attention (Peebles & Xie, arXiv 2212.09748).

``released=True`` gives the released shortcut code's conventions exactly; ``time_scale`` and the options after it give
those of SiT, of the DiT that predicts noise, and of diffusers' DiT, whose weights then fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from backbones.attention import Attention
from backbones.tokens import SIZES, Block, TokenNetwork, presets


class DiT(TokenNetwork):
    """A diffusion transformer s(x_t, t, d, y) for images (channels, height, width) or sequences (length, channels).

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        condition_shape: shape of a sample's condition tensor, instead of labels; zeros are the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        width, depth, heads: size of the transformer.
        patch: side of a patch; must divide height and width, or the length. None is 2 for images, 1 for sequences.
        mlp_ratio: hidden size of a block's MLP over its width.
        ignore_step_size: embed d = 1 whatever d is, as the released code does for its baselines.
        released: the released code's conventions: attention scaled by 1/head size instead of its square root, t
            not multiplied by 1000, blocks' modulation not started at zero, and its unused table of log-variances.
        time_scale: factor on the time that is embedded; None is 1000, or 1 with ``released``.
        time_frequency_shift: see :class:`backbones.embeddings.SinusoidalEmbedding`.
        mlp_norm_eps: of the norm before a block's MLP.
        diffusion: options of :class:`backbones.diffusion.Diffusion`, for weights that were trained to undo diffusion:
            the time that is embedded is the diffusion's, and the prediction is turned into the velocity.
        guidance_input: take the guidance scale as an input, see :class:`backbones.embeddings.Condition`.
        round_residual: see :class:`backbones.tokens.TokenNetwork`.

    Raises:
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
        ignore_step_size: bool = False,
        released: bool = False,
        time_scale: float | None = None,
        time_frequency_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
        diffusion: Mapping[str, Any] | None = None,
        guidance_input: bool = False,
        round_residual: bool = False,
    ) -> None:
        scale = heads / width if released else None
        if time_scale is None:
            time_scale = 1.0 if released else 1000.0
        super().__init__(
            lambda: Block(width, Attention(width, heads, scale), mlp_ratio, not released, mlp_norm_eps),
            shape=shape, num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            width=width, depth=depth, patch=patch,
            time_scale=time_scale, ignore_step_size=ignore_step_size, time_frequency_shift=time_frequency_shift,
            diffusion=diffusion, guidance_input=guidance_input, round_residual=round_residual,
        )  # fmt: skip
        if released:
            # Nothing reads it; it is there so that the authors' weights load and save completely. The released code
            # starts it at zero and gives it no gradient, so leaving it frozen is what its training does.
            self.log_variances = nn.Parameter(torch.zeros(256, 1), requires_grad=False)

    def reset_parameters(self) -> None:
        """As the skeleton; the released table at zero."""
        super().reset_parameters()
        if hasattr(self, "log_variances"):
            nn.init.zeros_(self.log_variances)


PRESETS = presets("dit", DiT, SIZES)
"""``dit`` with every size free; ``dit_{s,b,l,xl}`` of the DiT paper, with a patch ``dit_{s,b,l,xl}_{2,4,8}``."""
