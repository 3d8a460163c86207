"""Mamba: the token skeleton with selective state spaces (Gu & Dao, arXiv 2312.00752)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from backbones.mamba_mixer import MambaMixer
from backbones.tokens import SIZES, Block, TokenNetwork, presets


class Mamba(TokenNetwork):
    """A state space model s(x_t, t, d, y) for images (channels, height, width) or sequences (length, channels).

    Each block is Mamba's mixer over the tokens (an image's in rows) and an MLP, conditioned like DiT's. Its time
    grows with the number of tokens, attention's with the square.

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        condition_shape: shape of a sample's condition tensor, instead of labels; zeros are the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        width, depth: size of the stack.
        patch: side of a patch; must divide height and width, or the length. None is 2 for images, 1 for sequences.
        mlp_ratio: hidden size of a block's MLP over its width.
        state, conv, expand: of the mixer, see :class:`MambaMixer`.
        bidirectional: scan the tokens both ways; False is causal.
        kernels: "auto" for mamba-ssm's on a GPU where that package is installed, else PyTorch; or one of "mamba-ssm"
            and "torch".
        guidance_input: take the guidance scale as an input, see :class:`backbones.embeddings.Condition`.
        round_residual: see :class:`backbones.tokens.TokenNetwork`.

    Raises:
        ImportError: if kernels is "mamba-ssm" and that is not installed.
        ValueError: if sizes do not divide, for unknown kernels, or at a call if x_t, t, d or y do not fit.
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
        patch: int | None = None,
        mlp_ratio: float = 4.0,
        state: int = 16,
        conv: int = 4,
        expand: int = 2,
        bidirectional: bool = True,
        kernels: Literal["auto", "mamba-ssm", "torch"] = "auto",
        guidance_input: bool = False,
        round_residual: bool = False,
    ) -> None:
        def block() -> Block:
            mixer = MambaMixer(width, state, conv, expand, bidirectional=bidirectional, kernels=kernels)
            return Block(width, mixer, mlp_ratio)

        super().__init__(
            block,
            shape=shape, num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            width=width, depth=depth, patch=patch, guidance_input=guidance_input,
            round_residual=round_residual,
        )  # fmt: skip


PRESETS = presets(
    "mamba", Mamba, {size: {"width": SIZES[size]["width"], "depth": SIZES[size]["depth"]} for size in ("s", "b")}
)
"""``mamba`` with every size free; ``mamba_{s,b}`` as wide and deep as DiT's, ``mamba_{s,b}_{2,4,8}`` with a patch."""
