"""LSTM: the token skeleton with a recurrent network over the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.embeddings import require_positive
from backbones.recurrence import recurrent_layer, run_layer
from backbones.tokens import SIZES, Block, TokenNetwork, presets

GATES = {"lstm": 4, "gru": 3}
"""Cells and their number of gates."""


class Recurrent(nn.Module):
    """One recurrent layer as a token mixer.

    Args:
        width: channels of a token.
        cell: "lstm" or "gru".
        causal: run forwards only, so that no token sees a later one. Otherwise half of the channels run backwards.

    Raises:
        ValueError: for an unknown cell, or an odd width that does not split into two directions.
    """

    def __init__(self, width: int, cell: str = "lstm", causal: bool = False) -> None:
        super().__init__()
        require_positive(width=width)
        if cell not in GATES:
            raise ValueError(f"cell must be one of {', '.join(map(repr, GATES))}, got {cell!r}")
        if not causal and width % 2:
            raise ValueError(f"width must be even for two directions, got {width}")
        self.cell, self.causal, self.hidden = cell, causal, width if causal else width // 2
        gates = GATES[cell] * self.hidden
        # Not an nn.LSTM, which the compiler refuses to look at; names and shapes are its.
        for suffix in ("l0",) if causal else ("l0", "l0_reverse"):
            for name, shape in (("weight_ih", (gates, width)), ("weight_hh", (gates, self.hidden))):
                self.register_parameter(f"{name}_{suffix}", nn.Parameter(torch.empty(shape)))
            for name in ("bias_ih", "bias_hh"):
                self.register_parameter(f"{name}_{suffix}", nn.Parameter(torch.empty(gates)))

    def reset_parameters(self) -> None:
        """As nn.LSTM: uniform within 1/sqrt(hidden size)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.hidden**-0.5), self.hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) to the same."""
        # An exported graph runs where the operator is not installed.
        as_operator = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        layer = recurrent_layer if as_operator else run_layer
        return layer(x, list(self.parameters()), self.cell, not self.causal)


class LSTM(TokenNetwork):
    """A recurrent shortcut model s(x_t, t, d, y) for images (channels, height, width) or sequences (length, channels).

    Each block is a recurrent layer over the tokens (an image's in rows) and an MLP, conditioned like DiT's.

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        condition_shape: shape of a sample's condition tensor, instead of labels; zeros are the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        width, depth: size of the stack.
        patch: side of a patch; must divide height and width, or the length. None is 2 for images, 1 for sequences.
        mlp_ratio: hidden size of a block's MLP over its width.
        cell: "lstm" or "gru".
        causal: no token sees a later one; the default sees both ways.
        guidance_input: take the guidance scale as an input, see :class:`backbones.embeddings.Condition`.
        round_residual: see :class:`backbones.tokens.TokenNetwork`.

    Raises:
        ValueError: if sizes do not divide, for an unknown cell, or at a call if x_t, t, d or y do not fit.
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
        cell: Literal["lstm", "gru"] = "lstm",
        causal: bool = False,
        guidance_input: bool = False,
        round_residual: bool = False,
    ) -> None:
        super().__init__(
            lambda: Block(width, Recurrent(width, cell, causal), mlp_ratio),
            shape=shape, num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            width=width, depth=depth, patch=patch, guidance_input=guidance_input,
            round_residual=round_residual,
        )  # fmt: skip


PRESETS = presets(
    "lstm", LSTM, {size: {"width": SIZES[size]["width"], "depth": SIZES[size]["depth"]} for size in ("s", "b")}
)
"""``lstm`` with every size free; ``lstm_{s,b}`` as wide and deep as DiT's, ``lstm_{s,b}_{2,4,8}`` with a patch."""
