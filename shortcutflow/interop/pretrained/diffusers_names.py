"""diffusers' ``DiTTransformer2DModel`` and ``UNet2DModel``, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortcutflow.interop.pretrained.dit_sit import check_positions, kept_outputs, patches
from shortcutflow.interop.pretrained.foreign import Entry, Foreign, count_of, same
from shortcutflow.network import BackboneConfig, build_network

FIRST = "transformer_blocks.0.norm1.emb"
"""Each block of a DiT has an embedding of time and labels; the first block's is also the head's."""
POSITIONS = "pos_embed.pos_embed"
UNREAD = frozenset({
    "_class_name", "_diffusers_version", "_name_or_path", "sample_size", "in_channels", "out_channels", "dropout",
    "flip_sin_to_cos", "time_embedding_type", "class_embed_type", "num_class_embeds", "num_train_timesteps",
})  # fmt: skip
"""Of a U-Net's config, what its builder is not told."""
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


def _option(config: Mapping[str, Any], name: str, default: Any, known: tuple[Any, ...]) -> None:
    if config.get(name, default) not in known:
        raise ValueError(f"{name} {config[name]!r} is not supported; known: {', '.join(map(str, known))}")


def of_dit(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], diffusion: Mapping[str, Any], image_size: int | None
) -> Foreign:
    _option(config, "norm_type", "ada_norm_zero", ("ada_norm_zero",))
    _option(config, "activation_fn", "gelu-approximate", ("gelu-approximate",))
    _option(config, "attention_bias", True, (True,))
    _option(config, "norm_elementwise_affine", False, (False,))
    heads, patch = int(config.get("num_attention_heads", 16)), int(config.get("patch_size") or 2)
    width, channels = heads * int(config.get("attention_head_dim", 72)), int(config.get("in_channels") or 4)
    out_channels = int(config.get("out_channels") or channels)
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels {out_channels} must be in_channels {channels}, or twice that with a variance")
    block, rows = "transformer_blocks.", tensors.get(f"{FIRST}.class_embedder.embedding_table.weight")
    hidden = tensors.get(f"{block}0.ff.net.0.proj.weight")
    if rows is None or hidden is None or len(rows) < 2:
        raise ValueError("its weights have no transformer_blocks.0 with labels and a perceptron")
    options: dict[str, Any] = {
        "width": width, "depth": count_of(tensors, block), "heads": heads, "patch": patch,
        "mlp_ratio": len(hidden) / width, "time_scale": 1.0, "time_frequency_shift": 1,
        "mlp_norm_eps": float(config.get("norm_eps", 1e-5)), "diffusion": dict(diffusion),
    }  # fmt: skip
    entries = _dit_entries(options, len(rows), len(hidden), channels, out_channels)
    backbone, shape = BackboneConfig(name="dit", options=options), (channels, *_side(config, image_size))
    unread = {name for name in tensors if ".norm1.emb." in name and not name.startswith(f"{FIRST}.")}
    unread |= {POSITIONS} & tensors.keys()
    return Foreign(
        source="DiTTransformer2DModel of diffusers", backbone=backbone, shape=shape, num_classes=len(rows) - 1,
        entries=entries, unread=frozenset(unread),
        notes=(f"labels: {len(rows) - 1}, and the last row of the table is that of no label",),
    )  # fmt: skip


def _dit_entries(
    options: Mapping[str, Any], rows: int, hidden: int, channels: int, out_channels: int
) -> dict[str, Entry]:
    w, patch = options["width"], options["patch"]
    values = patch**2 * out_channels
    kept = partial(kept_outputs, channels=channels, out_channels=out_channels)
    found = {
        "patch_embedding.weight": Entry(("pos_embed.proj.weight",), (w, channels, patch, patch), patches),
        "patch_embedding.bias": Entry(("pos_embed.proj.bias",), (w,)),
        "condition.label.weight": Entry((f"{FIRST}.class_embedder.embedding_table.weight",), (rows, w)),
        "head.out.weight": Entry(("proj_out_2.weight",), (values, w), kept),
        "head.out.bias": Entry(("proj_out_2.bias",), (values,), kept),
    }
    linear: dict[str, tuple[tuple[str, ...], int, int]] = {
        "condition.time.hidden": ((f"{FIRST}.timestep_embedder.linear_1",), w, 256),
        "condition.time.out": ((f"{FIRST}.timestep_embedder.linear_2",), w, w),
        "head.modulation": (("proj_out_1",), 2 * w, w),
    }
    for i in range(options["depth"]):
        block = f"transformer_blocks.{i}"
        linear |= {
            f"blocks.{i}.modulation": ((f"{block}.norm1.linear",), 6 * w, w),
            f"blocks.{i}.mixer.qkv": (tuple(f"{block}.attn1.to_{part}" for part in "qkv"), w, w),
            f"blocks.{i}.mixer.out": ((f"{block}.attn1.to_out.0",), w, w),
            f"blocks.{i}.mlp.0": ((f"{block}.ff.net.0.proj",), hidden, w),
            f"blocks.{i}.mlp.2": ((f"{block}.ff.net.2",), w, hidden),
        }
    for ours, (theirs, height, columns) in linear.items():
        found[f"{ours}.weight"] = Entry(tuple(f"{name}.weight" for name in theirs), (height, columns), _stacked)
        found[f"{ours}.bias"] = Entry(tuple(f"{name}.bias" for name in theirs), (height,), _stacked)
    return found


def _stacked(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def check_unread(tensors: Mapping[str, Tensor], foreign: Foreign) -> None:
    """Raise ValueError unless a DiT's positions are the fixed ones and all blocks embed time and labels alike."""
    if POSITIONS in foreign.unread:
        check_positions(tensors[POSITIONS], foreign.backbone, foreign.shape, POSITIONS)
    for name in foreign.unread - {POSITIONS}:
        block = name.split(".")[1]
        first = tensors.get(f"{FIRST}.{name.partition('.norm1.emb.')[2]}")
        if first is None or not torch.equal(first, tensors[name]):
            raise ValueError(
                f"{name} is not that of block 0: block {block} has an embedding of its own, which is not supported"
            )


def name_of_today(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def of_unet(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], diffusion: Mapping[str, Any], image_size: int | None
) -> Foreign:
    _option(config, "time_embedding_type", "positional", ("positional",))
    _option(config, "class_embed_type", None, (None,))
    channels = int(config.get("in_channels", 3))
    classes = config.get("num_class_embeds")
    unet = {name: value for name, value in config.items() if name not in UNREAD}
    backbone = BackboneConfig(name="diffusers_unet", options={"unet": unet, "diffusion": dict(diffusion)})
    shape = (channels, *_side(config, image_size))
    with torch.device("meta"):
        network = build_network(backbone, shape=shape, num_classes=classes, finest_steps=2, seed=0)
    notes = []
    if classes is not None:
        notes.append(f"labels: {classes}; the table has no row for no label, so the mean of its rows is added as one")
    if config.get("dropout"):
        notes.append(f"dropout: none, where the original trained with {config['dropout']}")
    return Foreign(
        source="UNet2DModel of diffusers", backbone=backbone, shape=shape, num_classes=classes,
        entries=_unet_entries(network, config, channels), notes=tuple(notes),
    )  # fmt: skip


def _unet_entries(network: nn.Module, config: Mapping[str, Any], channels: int) -> dict[str, Entry]:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    flipped = config.get("flip_sin_to_cos", True)
    theirs = {
        "condition.time.hidden.weight": ("time_embedding.linear_1.weight", same if flipped else sines_last),
        "condition.time.hidden.bias": ("time_embedding.linear_1.bias", same),
        "condition.time.out.weight": ("time_embedding.linear_2.weight", same),
        "condition.time.out.bias": ("time_embedding.linear_2.bias", same),
    }
    found = {}
    doubled = int(config.get("out_channels", 3)) == 2 * channels
    for ours, shape in shapes.items():
        if ours == "condition.label.weight":
            found[ours] = Entry(("class_embedding.weight",), (shape[0] - 1, *shape[1:]), with_mean)
        elif ours in theirs:
            name, make = theirs[ours]
            found[ours] = Entry((name,), shape, make)
        elif ours.startswith("conv_out.") and doubled:
            found[ours] = Entry(
                (ours,), (2 * shape[0], *shape[1:]), partial(torch.narrow, dim=0, start=0, length=channels)
            )
        elif not ours.startswith("condition."):
            found[ours] = Entry((ours,), shape)
    return found


def sines_last(weight: Tensor) -> Tensor:
    """Columns for (sin, cos) as those for (cos, sin)."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def with_mean(table: Tensor) -> Tensor:
    """A table of labels with a last row for no label."""
    return torch.cat([table, table.mean(0, keepdim=True)])
