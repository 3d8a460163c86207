"""U-Net: residual convolutions over scales, for images and, in one dimension, for sequences.

Residual blocks as in ADM (Dhariwal & Nichol, arXiv 2105.05233): norm, SiLU, convolution, twice, the second norm scaled
and shifted by the condition. One code for both dimensions and any size, odd ones included: up-sampling goes to the size
of the level it returns to. (diffusers' UNet2DModel takes even sizes only, and its UNet1DModel no condition; either can
be used through ``backbones.adapt``.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.attention import Attention
from backbones.backbone import Backbone
from backbones.embeddings import Condition, require_positive

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of up to 32 groups of at least 4 channels."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class Stage(nn.Module):
    """A residual block, then, in some levels, self-attention over all places: the repeated part of the U-Net.

    Args:
        dimensions: 1 for sequences, 2 for images.
        channels_in, channels_out: before and after.
        condition_width: size of the condition.
        kernel: side of the convolutions.
        heads: of the attention; None has none.
    """

    def __init__(
        self, dimensions: int, channels_in: int, channels_out: int, condition_width: int, kernel: int, heads: int | None
    ) -> None:
        super().__init__()
        conv: Any = partial(CONVOLUTIONS[dimensions], kernel_size=kernel, padding=kernel // 2)
        self.norm_in, self.conv_in = group_norm(channels_in), conv(channels_in, channels_out)
        self.modulation = nn.Linear(condition_width, 2 * channels_out)
        self.norm_out, self.conv_out = group_norm(channels_out), conv(channels_out, channels_out)
        changes = channels_in != channels_out
        self.skip = CONVOLUTIONS[dimensions](channels_in, channels_out, 1) if changes else nn.Identity()
        self.norm_attention = group_norm(channels_out) if heads is not None else None
        self.attention = Attention(channels_out, heads) if heads is not None else None

    def reset_parameters(self) -> None:
        """PyTorch's own for each layer; both residuals start at zero."""
        for module in self.children():
            if not isinstance(module, nn.Identity):
                reset: Any = module.reset_parameters
                reset()
        zero(self.conv_out)
        if self.attention is not None:
            zero(self.attention.out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (b, channels_in, *sizes); c: SiLU of the condition (b, condition_width)."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.modulation(c).view(len(c), -1, *(1,) * (x.ndim - 2)).chunk(2, dim=1)
        h = self.conv_out(F.silu(torch.addcmul(shift, self.norm_out(h), 1 + scale)))
        x = self.skip(x) + h
        if self.attention is None or self.norm_attention is None:
            return x
        tokens = self.norm_attention(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


class UNet(Backbone):
    """A U-Net s(x_t, t, d, y) for images (channels, height, width) or sequences (length, channels), of any size.

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        condition_shape: shape of a sample's condition tensor, instead of labels; zeros are the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        width: channels at full resolution; a multiple of 4.
        multipliers: channels of each level over the width; each level has half the resolution of the one before.
        stages: residual blocks a level on the way down; one more on the way up.
        attention_levels: levels that have self-attention (0 is full resolution); if any has, so has the middle.
        head_width: channels of an attention head.
        kernel: side of the convolutions, odd.
        guidance_input: take the guidance scale as an input, see :class:`backbones.embeddings.Condition`.

    Raises:
        ValueError: if sizes do not fit each other, or at a call if x_t, t, d or y do not fit.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        num_classes: int | None = None,
        condition_shape: Sequence[int] | None = None,
        finest_steps: int = 128,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        stages: int = 2,
        attention_levels: Sequence[int] = (1,),
        head_width: int = 64,
        kernel: int = 3,
        guidance_input: bool = False,
    ) -> None:
        super().__init__(shape)
        _check_options(width, multipliers, stages, attention_levels, head_width, kernel)
        dimensions, widths, c_width = len(self.shape) - 1, [width * m for m in multipliers], 4 * width
        self.condition = Condition(
            c_width, num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            guidance_input=guidance_input,
        )  # fmt: skip
        conv = CONVOLUTIONS[dimensions]

        def stage(channels_in: int, level: int, attends: bool) -> Stage:
            heads = widths[level] // head_width if attends else None
            return Stage(dimensions, channels_in, widths[level], c_width, kernel, heads)

        self.conv_in = conv(self.channels, width, kernel, padding=kernel // 2)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        kept, here = [width], width  # channels of everything kept for the way up
        for level in range(len(widths)):
            if level:
                self.shrink.append(conv(here, here, 3, stride=2, padding=1))
                kept.append(here)
            for _ in range(stages):
                self.down.append(stage(here, level, level in attention_levels))
                here = widths[level]
                kept.append(here)
        last = len(widths) - 1
        self.middle = nn.ModuleList(stage(here, last, attends=bool(attention_levels) and i == 0) for i in range(2))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(stages + 1):
                self.up.append(stage(here + kept.pop(), level, level in attention_levels))
                here = widths[level]
            if level:
                self.grow.append(conv(here, here, 3, padding=1))
        self.norm_out, self.conv_out = group_norm(here), conv(here, self.channels, kernel, padding=kernel // 2)
        self.stages, self.levels = stages, len(widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's own for convolutions; residuals and the output start at zero."""
        for module in (self.condition, self.conv_in, self.norm_out, self.conv_out, *self.shrink, *self.grow):
            reset: Any = module.reset_parameters
            reset()
        for stage in self.shard_plan():
            reset = stage.reset_parameters
            reset()
        zero(self.conv_out)

    def shard_plan(self) -> list[nn.Module]:
        """The stages: down, middle, up."""
        return [*self.down, *self.middle, *self.up]

    def _predict(self, x: Tensor, c: Tensor) -> Tensor:
        """What the levels make of a sample (b, *shape) and the condition (b, width)."""
        c = F.silu(c)
        x = self.conv_in(x if self.is_image else x.transpose(1, 2))
        kept, down, up = [x], iter(self.down), iter(self.up)
        for level in range(self.levels):
            if level:
                x = self.shrink[level - 1](x)
                kept.append(x)
            for _ in range(self.stages):
                x = self.run(next(down), x, c)
                kept.append(x)
        for stage in self.middle:
            x = self.run(stage, x, c)
        for level in range(self.levels):
            for _ in range(self.stages + 1):
                x = self.run(next(up), torch.cat([x, kept.pop()], dim=1), c)
            if level < self.levels - 1:
                x = self.grow[level](F.interpolate(x, size=kept[-1].shape[2:], mode="nearest"))
        v = self.conv_out(F.silu(self.norm_out(x)))
        return v if self.is_image else v.transpose(1, 2)


def zero(layer: nn.Module) -> None:
    """Start a layer at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check_options(
    width: int, multipliers: Sequence[int], stages: int, levels: Sequence[int], head_width: int, kernel: int
) -> None:
    require_positive(width=width, stages=stages, head_width=head_width, **{"each multiplier": min(multipliers or [0])})
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}")
    for level in levels:
        if not 0 <= level < len(multipliers):
            raise ValueError(f"attention_levels must lie in 0 ... {len(multipliers) - 1}, got {level}")
        if width * multipliers[level] % head_width:
            raise ValueError(
                f"head_width must divide the channels of a level with attention: level {level} has "
                f"{width * multipliers[level]}, head_width is {head_width}"
            )
    if levels and width * multipliers[-1] % head_width:
        raise ValueError(
            f"head_width must divide the channels of the middle, {width * multipliers[-1]}, got {head_width}"
        )


PRESETS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "unet_cifar": partial(UNet, width=128, multipliers=(1, 2, 2, 2), stages=2, attention_levels=(1,)),
    "unet_s": partial(UNet, width=96, multipliers=(1, 2, 2), stages=2, attention_levels=(1, 2), head_width=48),
    "unet_b": partial(UNet, width=192, multipliers=(1, 2, 3), stages=2, attention_levels=(1, 2)),
    "unet1d_policy": partial(UNet, width=256, multipliers=(1, 2, 4), stages=2, attention_levels=(), kernel=5),
}
"""``unet`` with every size free; ``unet_cifar`` for 32x32 pixels (the size of DDPM's); ``unet_s`` and ``unet_b`` for
32x32x4 latents (near DiT-S and DiT-B in parameters); ``unet1d_policy`` for trajectories (the shape of diffusion
policy's, arXiv 2303.04137)."""
