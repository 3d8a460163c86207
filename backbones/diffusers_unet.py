"""The U-Net of diffusers (``UNet2DModel``) as a shortcut model, so that its pretrained weights are a start.

Its blocks are diffusers' own and keep their names. Time, step size and labels are embedded as in every network here,
which for time and labels is what diffusers does. Images only, of sizes that halve as often as there are levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.diffusion import Diffusion
from backbones.embeddings import Condition, require_positive

PARTS = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
"""The modules kept from diffusers' network; its embeddings are replaced by :class:`Condition`."""
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
OPTIONS = (
    "act_fn", "add_attention", "attention_head_dim", "attn_norm_num_groups", "block_out_channels",
    "center_input_sample", "down_block_types", "downsample_padding", "downsample_type", "freq_shift",
    "layers_per_block", "mid_block_scale_factor", "mid_block_type", "norm_eps", "norm_num_groups",
    "resnet_time_scale_shift", "time_embedding_dim", "up_block_types", "upsample_type",
)  # fmt: skip
"""Of ``UNet2DModel``, those that may be given."""
MOST_LAYERS, MOST_CHANNELS = 64, 2**16


class DiffusersUNet(Backbone):
    """diffusers' U-Net s(x_t, t, d, y) for images (channels, height, width).

    Args:
        shape: shape of one sample.
        num_classes: number of labels; label ``num_classes`` is the null condition. None: no labels.
        condition_shape: shape of a sample's condition tensor, instead of labels; zeros are the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same to the network.
        unet: options of ``UNet2DModel``; those that are left out are its own. Dropout is none.
        diffusion: options of :class:`backbones.diffusion.Diffusion`, for weights that were trained to undo diffusion.

    Raises:
        ImportError: if diffusers is not installed.
        ValueError: if options or sizes do not fit, or at a call if x_t, t, d or y do not fit.
    """

    conv_in: nn.Module
    down_blocks: nn.ModuleList
    mid_block: nn.Module | None
    up_blocks: nn.ModuleList
    conv_norm_out: nn.Module
    conv_act: nn.Module
    conv_out: nn.Module

    def __init__(
        self,
        *,
        shape: Sequence[int],
        num_classes: int | None = None,
        condition_shape: Sequence[int] | None = None,
        finest_steps: int = 128,
        unet: Mapping[str, Any] | None = None,
        diffusion: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(shape)
        if not self.is_image:
            raise ValueError(f"diffusers' U-Net is for images (channels, height, width), got {self.shape}")
        unet_2d = _built(self.channels, dict(unet or {}))
        for part in PARTS:
            setattr(self, part, getattr(unet_2d, part))
        self.center_input_sample = bool(unet_2d.config.center_input_sample)
        widths = unet_2d.config.block_out_channels
        halvings = 2 ** (len(widths) - 1)
        if any(size % halvings for size in self.shape[1:]):
            raise ValueError(f"height and width must be multiples of {halvings}, got {self.shape[1:]}")
        self.diffusion = None if diffusion is None else Diffusion.of(diffusion)
        self.condition = Condition(
            unet_2d.config.time_embedding_dim or 4 * widths[0],
            num_classes=num_classes, condition_shape=condition_shape, finest_steps=finest_steps,
            time_scale=1000.0 if diffusion is None else 1.0,
            time_features=widths[0], time_frequency_shift=unet_2d.config.freq_shift,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """PyTorch's own for each layer, as diffusers leaves them."""
        self.condition.reset_parameters()
        if self.diffusion is not None:
            self.diffusion.reset_parameters()
        for part in PARTS:
            found = getattr(self, part)
            for module in found.modules() if found is not None else ():
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()

    def shard_plan(self) -> list[nn.Module]:
        """The blocks: down, middle, up."""
        return [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block]), *self.up_blocks]

    def _predict(self, x: Tensor, c: Tensor) -> Tensor:
        """What the blocks make of a sample (b, *shape) and the condition (b, width)."""
        x = self.conv_in(2 * x - 1 if self.center_input_sample else x)
        kept = [x]
        for block in self.down_blocks:
            x, states = self.run(block, x, c)
            kept += states
        if self.mid_block is not None:
            x = self.run(self.mid_block, x, c)
        for block in self.up_blocks:
            resnets: Any = block.resnets
            count = len(resnets)
            x = self.run(block, x, tuple(kept[-count:]), c)
            del kept[-count:]
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


def _built(channels: int, options: dict[str, Any]) -> Any:
    """Their network; its embeddings come with it and are dropped."""
    _check(options)
    try:
        # Takes seconds to load, so only this network pays for it.
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "this network is made of diffusers' blocks: pip install 'shortcutflow[latents]', which brings diffusers"
        ) from error
    try:
        return UNet2DModel(in_channels=channels, out_channels=channels, dropout=0.0, **options)
    except (TypeError, ZeroDivisionError, AttributeError, IndexError) as error:
        raise ValueError(f"diffusers' U-Net cannot be built with {options}: {error}") from error


def _check(options: Mapping[str, Any]) -> None:
    if unknown := [name for name in options if name not in OPTIONS]:
        raise ValueError(f"unet has no option {unknown[0]!r} here; known: {', '.join(OPTIONS)}")
    for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
        if wrong := [kind for kind in options.get(name, ()) if kind not in known]:
            raise ValueError(f"{name} may be {', '.join(known)}, got {wrong[0]!r}")
    widths = options.get("block_out_channels", (1,))
    require_positive(layers_per_block=options.get("layers_per_block"), **{"each width": min(widths, default=0)})
    layers = options.get("layers_per_block", 1) * len(widths)
    if layers > MOST_LAYERS or max(widths) > MOST_CHANNELS:
        raise ValueError(
            f"a U-Net has at most {MOST_LAYERS} layers of {MOST_CHANNELS} channels, got {layers} of {widths}"
        )


PRESETS: dict[str, Callable[..., nn.Module]] = {"diffusers_unet": DiffusersUNet}
"""``diffusers_unet``, of the size of ``UNet2DModel`` unless ``unet`` says otherwise."""
