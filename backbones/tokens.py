"""The skeleton of every token model: patches -> blocks -> patches, modulated by the embedding of t, d and y.

A block is a token mixer and a perceptron, each behind a modulated norm and gated onto the residual stream (adaptive
layer norm, "adaLN-zero": Peebles & Xie, arXiv 2212.09748). DiT is this skeleton with attention; an LSTM or a state
space model is this skeleton with another mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.diffusion import Diffusion
from backbones.embeddings import Condition, require_positive, sincos_positions, under_autocast, without_autocast


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift, with x (b, n, w) and shift, scale (b, 1, w); the norm has no weights.

    In float32 under autocast, also of a rounded x.
    """
    if x.dtype.itemsize == 2 and under_autocast(x):
        x = x.float()  # as a GPU's autocast does; a CPU's would round mean and standard deviation
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class TokenLinear(nn.Linear):
    """A linear layer for tokens (b, n, width_in), followed by something element by element.

    Compiled for a GPU, its bias's gradient is summed over each sample's tokens first: the compiler then sums in the
    kernel that makes the output's gradient, where a sum over all rows at once would read that from memory again. For a
    CPU it fuses otherwise, and gains nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width_in) to (b, n, width_out)."""
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if not (compiled and x.is_cuda and torch.is_grad_enabled()):
            return super().forward(x)
        return linear_by_sample(x, self.weight, self.bias)


def linear_by_sample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of tokens (b, n, width), whose bias's gradient is summed over n, then over b."""
    if not under_autocast(x):
        return _LinearBySample.apply(x, weight, bias)
    dtype = torch.get_autocast_dtype(x.device.type)
    return _LinearBySample.apply(x.to(dtype), weight.to(dtype), bias.to(dtype))


class _LinearBySample(torch.autograd.Function):
    """Linear in (x, weight, bias), its gradients those of F.linear but for the order of one sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        # Traced under the forward pass's autocast, which would convert what is summed, and then keep it so.
        with without_autocast(grad):
            of_bias = grad.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).sum(0)
            return grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1), of_bias.to(grad.dtype)


class Block(nn.Module):
    """A token mixer, then a perceptron; each normalised, modulated by the condition, and gated onto the residual.

    Args:
        width: channels of a token.
        mixer: maps tokens (b, n, width) to the same; has ``reset_parameters``.
        mlp_ratio: hidden size of the perceptron over the width.
        zero_modulation: start every block as the identity.
        mlp_norm_eps: of the norm before the perceptron; that before the mixer has 1e-6.
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        zero_modulation: bool = True,
        mlp_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.zero_modulation, self.mlp_norm_eps = zero_modulation, mlp_norm_eps
        self.modulation = nn.Linear(width, 6 * width)
        self.mixer = mixer
        self.mlp = nn.Sequential(
            TokenLinear(width, int(width * mlp_ratio)),
            nn.GELU(approximate="tanh"),
            nn.Linear(int(width * mlp_ratio), width),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform perceptron, zero biases, and the mixer's own start."""
        xavier(self.modulation, *self.mlp)
        if self.zero_modulation:
            nn.init.zeros_(self.modulation.weight)
        reset: Any = self.mixer.reset_parameters
        reset()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: tokens (b, n, width); c: SiLU of the condition (b, width)."""
        shift_mixer, scale_mixer, gate_mixer, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )
        x = torch.addcmul(x, gate_mixer, self.mixer(modulated_norm(x, shift_mixer, scale_mixer)))
        return torch.addcmul(x, gate_mlp, self.mlp(modulated_norm(x, shift_mlp, scale_mlp, self.mlp_norm_eps)))


class Head(nn.Module):
    """The last modulated norm and the projection to the values of a patch; starts at zero."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(b, n, width) to (b, n, out_width)."""
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.out(modulated_norm(x, shift, scale))


class TokenNetwork(Backbone):
    """Patches of an image or a sequence through a stack of conditioned blocks.

    Args:
        block: makes one block; called as block(x, c) with tokens (b, n, width) and SiLU of the condition (b, width).
        shape, num_classes, condition_shape, finest_steps: as for every backbone; see :class:`Condition`.
        width, depth: size of the stack.
        patch: side of a patch; must divide height and width, or the length. None is 2 for images, 1 for sequences.
        time_scale, time_frequency_shift, ignore_step_size, guidance_input: see :class:`Condition`.
        round_residual: under autocast, round the residual stream to autocast's type, which halves what a training step
            moves and keeps of it; otherwise it is float32 there. Norms are float32 in both.
        diffusion: options of :class:`backbones.diffusion.Diffusion`, for blocks that were trained to undo diffusion.

    Raises:
        ValueError: if sizes do not divide, or at a call if x_t, t, d or y do not fit.
    """

    positions: Tensor

    def __init__(
        self,
        block: Callable[[], nn.Module],
        *,
        shape: Sequence[int],
        num_classes: int | None,
        condition_shape: Sequence[int] | None,
        finest_steps: int,
        width: int,
        depth: int,
        patch: int | None,
        time_scale: float = 1000.0,
        ignore_step_size: bool = False,
        time_frequency_shift: int = 0,
        diffusion: Mapping[str, Any] | None = None,
        guidance_input: bool = False,
        round_residual: bool = False,
    ) -> None:
        super().__init__(shape)
        require_positive(width=width, depth=depth)
        self.round_residual = round_residual
        self.width = width
        self.patch = patch if patch is not None else 2 if self.is_image else 1
        self._check_patch(self.shape[1:] if self.is_image else self.shape[:1])
        values = self.channels * self.patch ** (len(self.shape) - 1)
        self.patch_embedding = nn.Linear(values, width)
        self.register_buffer("positions", self._positions(), persistent=False)
        self.condition = Condition(
            width, num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            time_scale=time_scale, ignore_step_size=ignore_step_size, time_frequency_shift=time_frequency_shift,
            guidance_input=guidance_input,
        )  # fmt: skip
        self.diffusion = None if diffusion is None else Diffusion.of(diffusion)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = Head(width, values)
        xavier(self.patch_embedding)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases; blocks that start as the identity and a head that starts at zero."""
        xavier(self.patch_embedding)
        self.positions.copy_(self._positions())
        for module in (self.condition, *self.blocks, self.head, *([] if self.diffusion is None else [self.diffusion])):
            reset: Any = module.reset_parameters
            reset()

    def shard_plan(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def _predict(self, x: Tensor, c: Tensor) -> Tensor:
        """What the blocks make of a sample (b, *shape) and the condition (b, width)."""
        c, tokens = F.silu(c), self._to_tokens(x)
        patches = self.patch_embedding(tokens)
        tokens = patches + self._positions_of(tokens).to(x.dtype)
        for block in self.blocks:
            tokens = self.run(block, tokens.to(patches.dtype) if self.round_residual else tokens, c)
        return self._from_tokens(self.head(tokens, c))

    def _to_tokens(self, x: Tensor) -> Tensor:
        if self.is_image:
            return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        self._check_patch(x.shape[1:2])
        return rearrange(x, "b (n p) c -> b n (p c)", p=self.patch)

    def _from_tokens(self, x: Tensor) -> Tensor:
        if self.is_image:
            h = self.shape[1] // self.patch
            return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=self.patch, q=self.patch)
        return rearrange(x, "b n (p c) -> b (n p) c", p=self.patch)

    def _positions(self) -> Tensor:
        grid = self.shape[1:] if self.is_image else self.shape[:1]
        return sincos_positions(self.width, *(size // self.patch for size in grid))

    def _positions_of(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        if n <= len(self.positions):
            return self.positions[:n]
        return sincos_positions(self.width, n).to(tokens.device)

    def _check_patch(self, sizes: Sequence[int]) -> None:
        if self.patch < 1 or any(size % self.patch or size < 1 for size in sizes):
            raise ValueError(f"patch must divide the sizes {tuple(sizes)}, got {self.patch}; 1 always does")


def xavier(*modules: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of those that are linear layers."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


SIZES: dict[str, dict[str, int]] = {
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
    "xl": {"width": 1152, "depth": 28, "heads": 16},
}
"""The sizes of the DiT paper."""


def presets(family: str, network: Callable[..., nn.Module], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Names of a family: ``family`` with every size free, ``family_size``, and ``family_size_patch``."""
    found: dict[str, Any] = {family: network}
    for size, options in sizes.items():
        found[f"{family}_{size}"] = partial(network, **options)
        for patch in (2, 4, 8):
            found[f"{family}_{size}_{patch}"] = partial(network, patch=patch, **options)
    return found
