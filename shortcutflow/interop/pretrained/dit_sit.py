"""The public layout of SiT's and DiT's checkpoints (Ma et al., arXiv 2401.08740; Peebles & Xie, arXiv 2212.09748).

Both have the same names and shapes, so that a file does not tell which it is:

* SiT predicts x_1 - x_0 on the path t x_1 + (1 - t) x_0, the same as here, at t in [0, 1] without a factor;
* DiT predicts the noise of a diffusion of 1000 times with beta from 1e-4 to 0.02, see ``backbones/diffusion.py``.

The outputs may be doubled (``learn_sigma``): channels c ... 2c - 1 are a variance, which an ODE never reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.interop.pretrained.foreign import Entry, Foreign, count_of
from shortcutflow.interop.released.sizes import usual_heads
from shortcutflow.network import BackboneConfig, build_network

Kind = Literal["sit", "dit"]
PATCHES, TABLE, POSITIONS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"
HIDDEN, LAST = "blocks.0.mlp.fc1.weight", "final_layer.linear.weight"
DIFFUSION = {"predicts": "noise", "schedule": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
"""DiT's, and the one of DDPM."""
LATENT_CHANNELS, SCALING = 4, "0.18215"


class Sizes(NamedTuple):
    """Of a network, as its arrays tell."""

    width: int
    depth: int
    patch: int
    channels: int
    out_channels: int
    hidden: int
    num_classes: int
    image_size: int


def kind_of(path: Path) -> Kind:
    """SiT or DiT, by the name of the file.

    Raises:
        ValueError: if it does not tell.
    """
    said = {word.lower() for word in re.findall(r"(?i)(?<![a-z])(?:sit|dit)(?![a-z])", path.name)}
    match sorted(said):
        case ["sit"]:
            return "sit"
        case ["dit"]:
            return "dit"
    raise ValueError(
        f"{path}: SiT and DiT have the same parameters, so the file does not tell which of them it is; "
        "give --kind sit (predicts the velocity) or --kind dit (predicts noise)"
    )


def describe(
    tensors: Mapping[str, Tensor], kind: Kind, *, heads: int | None = None, image_size: int | None = None
) -> Foreign:
    """What a state dict in this layout is.

    Raises:
        ValueError: if it is none, or the sizes contradict each other.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(get_args(Kind))}")
    name = {"sit": "SiT", "dit": "DiT"}[kind]
    sizes, notes = _sizes(tensors, name), []
    if image_size not in (None, sizes.image_size):
        raise ValueError(f"image_size {image_size}: its positions are those of samples of side {sizes.image_size}")
    if heads is None:
        heads = usual_heads(sizes.width)
        notes.append(f"heads: {heads}, the usual number for width {sizes.width}; the file does not tell (--heads)")
    notes.append(f"labels: {sizes.num_classes}, and the last row of the table is that of no label")
    notes.append({
        "sit": "prediction: velocity of the linear path, as in the released models",
        "dit": "prediction: noise of the linear schedule of 1000 times, as in the released models",
    }[kind])  # fmt: skip
    options: dict[str, Any] = {
        "width": sizes.width, "depth": sizes.depth, "heads": heads, "patch": sizes.patch,
        "mlp_ratio": sizes.hidden / sizes.width, "time_scale": 1.0,
    }  # fmt: skip
    if kind == "dit":
        options["diffusion"] = DIFFUSION
    latents = sizes.channels == LATENT_CHANNELS
    return Foreign(
        source=f"{name} checkpoint", backbone=BackboneConfig(name="dit", options=options),
        shape=(sizes.channels, sizes.image_size, sizes.image_size), num_classes=sizes.num_classes,
        entries=_entries(sizes), unread=frozenset({POSITIONS}), vae=DEFAULT_VAE if latents else None,
        notes=tuple(notes), about={"latents": f"scaled by {SCALING}"} if latents else {},
    )  # fmt: skip


def check_positions(found: Tensor, backbone: BackboneConfig, shape: tuple[int, ...], name: str = POSITIONS) -> None:
    """Raise ValueError unless positions are the fixed ones that the network computes."""
    patch = backbone.options["patch"]
    if tuple(found.shape[1:]) != (math.prod(side // patch for side in shape[1:]), backbone.options["width"]):
        raise ValueError(f"{name} has shape {tuple(found.shape)}, which samples of shape {shape} do not have")
    # One block has the same positions as all of them.
    tiny = backbone.model_copy(update={"options": backbone.options | {"depth": 1}})
    network = build_network(tiny, shape=shape, num_classes=None, finest_steps=2, seed=0)
    found = found.float()
    off = (found.reshape(-1, found.shape[-1]) - network.get_buffer("positions")).abs().max()
    # A file of float32 may hold numbers that were rounded to half precision before.
    rounded = (torch.bfloat16, torch.float16)
    precision = next((dtype for dtype in rounded if torch.equal(found, found.to(dtype).float())), torch.float32)
    if not off < 1e-4 + torch.finfo(precision).eps:
        raise ValueError(
            f"{name} is not the fixed sine-cosine table (off by {off:.3g}); a learned one is not supported"
        )


def _sizes(tensors: Mapping[str, Tensor], name: str) -> Sizes:
    for needed, dimensions in ((PATCHES, 4), (TABLE, 2), (POSITIONS, 3), (HIDDEN, 2), (LAST, 2)):
        if needed not in tensors or tensors[needed].ndim != dimensions:
            what = "is missing" if needed not in tensors else f"has shape {tuple(tensors[needed].shape)}"
            raise ValueError(f"it is no {name} checkpoint: {needed} {what}")
    width, channels, patch, _ = tensors[PATCHES].shape
    side = math.isqrt(tensors[POSITIONS].shape[1])
    values = patch**2 * channels
    rows = tensors[LAST].shape[0]
    if min(width, values, side) < 1 or width % 4 or side**2 != tensors[POSITIONS].shape[1] or len(tensors[TABLE]) < 2:
        raise ValueError(f"it is no {name} checkpoint: its patches, positions or labels have impossible sizes")
    if rows not in (values, 2 * values):
        raise ValueError(f"{LAST} has {rows} rows; the patches make it {values}, or {2 * values} with a variance")
    sizes = Sizes(
        width=width, depth=count_of(tensors, "blocks."), patch=patch, channels=channels,
        out_channels=rows // patch**2, hidden=len(tensors[HIDDEN]), num_classes=len(tensors[TABLE]) - 1,
        image_size=side * patch,
    )  # fmt: skip
    if tuple(tensors[POSITIONS].shape) != (1, side**2, width):
        raise ValueError(f"{POSITIONS} has shape {tuple(tensors[POSITIONS].shape)}; the width makes it (1, n, {width})")
    return sizes


def patches(weight: Tensor) -> Tensor:
    """A convolution's weights (w, c, p, q) as those of a linear layer on (p q c)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def kept_outputs(values: Tensor, *, channels: int, out_channels: int) -> Tensor:
    """Of rows (p q out_channels), those of the first ``channels``."""
    return values.unflatten(0, (-1, out_channels))[:, :channels].flatten(0, 1)


def _entries(sizes: Sizes) -> dict[str, Entry]:
    w, hidden, values = sizes.width, sizes.hidden, sizes.patch**2 * sizes.out_channels
    kept = partial(kept_outputs, channels=sizes.channels, out_channels=sizes.out_channels)
    found = {
        "patch_embedding.weight": Entry((PATCHES,), (w, sizes.channels, sizes.patch, sizes.patch), patches),
        "patch_embedding.bias": Entry(("x_embedder.proj.bias",), (w,)),
        "condition.label.weight": Entry((TABLE,), (sizes.num_classes + 1, w)),
        "head.out.weight": Entry((LAST,), (values, w), kept),
        "head.out.bias": Entry(("final_layer.linear.bias",), (values,), kept),
    }
    linear = {
        "condition.time.hidden": ("t_embedder.mlp.0", w, 256),
        "condition.time.out": ("t_embedder.mlp.2", w, w),
        "head.modulation": ("final_layer.adaLN_modulation.1", 2 * w, w),
    }
    for i in range(sizes.depth):
        linear |= {
            f"blocks.{i}.modulation": (f"blocks.{i}.adaLN_modulation.1", 6 * w, w),
            f"blocks.{i}.mixer.qkv": (f"blocks.{i}.attn.qkv", 3 * w, w),
            f"blocks.{i}.mixer.out": (f"blocks.{i}.attn.proj", w, w),
            f"blocks.{i}.mlp.0": (f"blocks.{i}.mlp.fc1", hidden, w),
            f"blocks.{i}.mlp.2": (f"blocks.{i}.mlp.fc2", w, hidden),
        }
    for ours, (theirs, rows, columns) in linear.items():
        found[f"{ours}.weight"] = Entry((f"{theirs}.weight",), (rows, columns))
        found[f"{ours}.bias"] = Entry((f"{theirs}.bias",), (rows,))
    return found
