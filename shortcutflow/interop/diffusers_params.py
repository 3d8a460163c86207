"""diffusers' ``DiTTransformer2DModel`` and ``UNet2DModel``, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortcutflow.interop.conversion import (
    Conversion,
    DiTSizes,
    ParamSource,
    check_positions,
    count_blocks,
    dit_backbone,
    dit_params,
)
from shortcutflow.network import BackboneConfig, build_network

FIRST = "transformer_blocks.0.norm1.emb"
"""Each block of a DiT has an embedding of time and labels; the first block's is also the head's."""
POSITIONS, LABEL_TABLE = "pos_embed.pos_embed", f"{FIRST}.class_embedder.embedding_table.weight"
LAYERS: dict[str, str | tuple[str, ...]] = {
    "patch_embedding": "pos_embed.proj",
    "condition.time.hidden": f"{FIRST}.timestep_embedder.linear_1",
    "condition.time.out": f"{FIRST}.timestep_embedder.linear_2",
    "head.modulation": "proj_out_1",
    "head.out": "proj_out_2",
    "blocks.{i}.modulation": "transformer_blocks.{i}.norm1.linear",
    "blocks.{i}.mixer.qkv": tuple(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"),
    "blocks.{i}.mixer.out": "transformer_blocks.{i}.attn1.to_out.0",
    "blocks.{i}.mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
    "blocks.{i}.mlp.2": "transformer_blocks.{i}.ff.net.2",
}
"""Linear layers of the backbone "dit", and of diffusers' network."""
NOT_BUILT = frozenset({
    "_class_name", "_diffusers_version", "_name_or_path", "sample_size", "in_channels", "out_channels", "dropout",
    "flip_sin_to_cos", "time_embedding_type", "class_embed_type", "num_class_embeds", "num_train_timesteps",
})  # fmt: skip
"""Of a U-Net's config, what is no option of the builder."""
LARGEST = 4096
"""Side of a sample."""
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of a U-Net's attention in files from before 2023, and those of today."""


def _side(config: Mapping[str, Any], image_size: int | None) -> tuple[int, int]:
    """Height and width of a sample."""
    size = image_size if image_size is not None else config.get("sample_size")
    if size is None:
        raise ValueError("its config has no sample_size: give the side of its samples with --image-size")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= LARGEST for side in sides):
        raise ValueError(f"sample_size {size!r} is no size of an image")
    return sides


def _require(config: Mapping[str, Any], **options: Any) -> None:
    for name, value in options.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} {config[name]!r} is not supported, only {value}")


def describe_dit(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], diffusion: Mapping[str, Any], image_size: int | None
) -> Conversion:
    _require(
        config, norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True,
        norm_elementwise_affine=False,
    )  # fmt: skip
    heads, patch = int(config.get("num_attention_heads", 16)), int(config.get("patch_size") or 2)
    hidden_size, channels = heads * int(config.get("attention_head_dim", 72)), int(config.get("in_channels") or 4)
    out_channels = int(config.get("out_channels") or channels)
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels {out_channels} must be in_channels {channels}, or twice that with a variance")
    blocks, table = "transformer_blocks.", tensors.get(LABEL_TABLE)
    mlp = tensors.get(f"{blocks}0.ff.net.0.proj.weight")
    if table is None or mlp is None or len(table) < 2:
        raise ValueError("its weights have no transformer_blocks.0 with labels and an MLP")
    sizes = DiTSizes(
        hidden_size, count_blocks(tensors, blocks), len(mlp), patch, channels, out_channels, len(table) - 1
    )
    backbone = dit_backbone(
        sizes, heads, time_scale=1.0, time_frequency_shift=1, mlp_norm_eps=float(config.get("norm_eps", 1e-5)),
        diffusion=dict(diffusion),
    )  # fmt: skip
    ignored = {name for name in tensors if ".norm1.emb." in name and not name.startswith(f"{FIRST}.")}
    ignored |= {POSITIONS} & tensors.keys()
    return Conversion(
        source="DiTTransformer2DModel of diffusers", backbone=backbone, shape=(channels, *_side(config, image_size)),
        num_classes=len(table) - 1, params=dit_params(sizes, LAYERS, LABEL_TABLE), ignored=frozenset(ignored),
        notes=(f"labels: {len(table) - 1}, and the last row of the table is that of no label",),
    )  # fmt: skip


def check_ignored(tensors: Mapping[str, Tensor], conversion: Conversion) -> None:
    """Raise ValueError unless a DiT's positions are the fixed ones and all blocks embed time and labels alike."""
    if POSITIONS in conversion.ignored:
        check_positions(tensors[POSITIONS], conversion.backbone, conversion.shape, POSITIONS)
    for name in conversion.ignored - {POSITIONS}:
        block = name.split(".")[1]
        first = tensors.get(f"{FIRST}.{name.partition('.norm1.emb.')[2]}")
        if first is None or not torch.equal(first, tensors[name]):
            raise ValueError(
                f"{name} is not that of block 0: block {block} has an embedding of its own, which is not supported"
            )


def current_name(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def describe_unet(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], diffusion: Mapping[str, Any], image_size: int | None
) -> Conversion:
    _require(config, time_embedding_type="positional", class_embed_type=None)
    channels = int(config.get("in_channels", 3))
    classes = config.get("num_class_embeds")
    unet = {name: value for name, value in config.items() if name not in NOT_BUILT}
    backbone = BackboneConfig(name="diffusers_unet", options={"unet": unet, "diffusion": dict(diffusion)})
    shape = (channels, *_side(config, image_size))
    with torch.device("meta"):
        network = build_network(backbone, shape=shape, num_classes=classes, finest_steps=2, seed=0)
    notes = []
    if classes is not None:
        notes.append(f"labels: {classes}; the table has no row for no label, so the mean of its rows is added as one")
    if config.get("dropout"):
        notes.append(f"dropout: none, where the original trained with {config['dropout']}")
    return Conversion(
        source="UNet2DModel of diffusers", backbone=backbone, shape=shape, num_classes=classes,
        params=_unet_params(network, config, channels), notes=tuple(notes),
    )  # fmt: skip


def _unet_params(network: nn.Module, config: Mapping[str, Any], channels: int) -> dict[str, ParamSource]:
    swapped = None if config.get("flip_sin_to_cos", True) else sines_last
    sources: dict[str, tuple[str, Callable[..., Tensor] | None]] = {
        "condition.time.hidden.weight": ("time_embedding.linear_1.weight", swapped),
        "condition.time.hidden.bias": ("time_embedding.linear_1.bias", None),
        "condition.time.out.weight": ("time_embedding.linear_2.weight", None),
        "condition.time.out.bias": ("time_embedding.linear_2.bias", None),
    }
    with_variance = int(config.get("out_channels", 3)) == 2 * channels
    params = {}
    for name, tensor in network.state_dict().items():
        rows, *columns = tensor.shape
        if name == "condition.label.weight":
            params[name] = ParamSource(("class_embedding.weight",), (rows - 1, *columns), with_mean)
        elif name.startswith("conv_out.") and with_variance:
            first = partial(torch.narrow, dim=0, start=0, length=channels)
            params[name] = ParamSource((name,), (2 * rows, *columns), first)
        elif name in sources or not name.startswith("condition."):
            source, transform = sources.get(name, (name, None))
            params[name] = ParamSource((source,), (rows, *columns), transform)
    return params


def sines_last(weight: Tensor) -> Tensor:
    """Columns for (sin, cos) as those for (cos, sin)."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def with_mean(table: Tensor) -> Tensor:
    """A table of labels with a last row for no label."""
    return torch.cat([table, table.mean(0, keepdim=True)])
