"""The public layout of SiT's and DiT's checkpoints (Ma et al., arXiv 2401.08740; Peebles & Xie, arXiv 2212.09748).

Both have the same names and shapes, so that a file does not say which it is:

* SiT predicts x_1 - x_0 on the path t x_1 + (1 - t) x_0, the same as here, at t in [0, 1] without a factor;
* DiT predicts the noise of a diffusion of 1000 times with beta from 1e-4 to 0.02, see ``backbones/diffusion.py``.

The outputs may be doubled (``learn_sigma``): channels c ... 2c - 1 are a variance, which an ODE never reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.interop.conversion import (
    Conversion,
    DiTSizes,
    ReadTensor,
    check_positions,
    count_blocks,
    dit_backbone,
    dit_params,
    usual_heads,
)
from shortcutflow.interop.diffusers_folder import WEIGHTS_NAME
from shortcutflow.interop.torch_file import read_state_dicts

Kind = Literal["sit", "dit"]
PATCHES, TABLE, POSITIONS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"
HIDDEN, LAST = "blocks.0.mlp.fc1.weight", "final_layer.linear.weight"
DIFFUSION = {"predicts": "noise", "schedule": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
"""DiT's, and the one of DDPM."""
PREDICTIONS = {
    "sit": "velocity of the linear path, as in the published models",
    "dit": "noise of the linear schedule of 1000 times, as in the published models",
}
LATENT_CHANNELS, SCALING = 4, "0.18215"
LAYERS = {
    "patch_embedding": "x_embedder.proj",
    "condition.time.hidden": "t_embedder.mlp.0",
    "condition.time.out": "t_embedder.mlp.2",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.out": "final_layer.linear",
    "blocks.{i}.modulation": "blocks.{i}.adaLN_modulation.1",
    "blocks.{i}.mixer.qkv": "blocks.{i}.attn.qkv",
    "blocks.{i}.mixer.out": "blocks.{i}.attn.proj",
    "blocks.{i}.mlp.0": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "blocks.{i}.mlp.fc2",
}
"""Linear layers of the backbone "dit", and of these checkpoints."""


def read_dit_sit(
    path: Path, kind: Kind | None = None, *, heads: int | None = None, image_size: int | None = None
) -> tuple[Conversion, dict[str, ReadTensor]]:
    """What a file of torch.save or safetensors holds, and its weights by name: "current", "ema" or both.

    Arguments as of :func:`shortcutflow.interop.convert.convert`.

    Raises:
        ValueError: if it is no such file, the name does not say the kind, or the sizes contradict each other.
    """
    if WEIGHTS_NAME.fullmatch(path.name) and (path.parent / "config.json").is_file():
        raise ValueError(f"{path} is described by the config.json beside it: give the folder {path.parent}")
    sets = read_state_dicts(path)
    kind = kind or _kind_of(path)
    try:
        conversion = _describe(next(iter(sets.values())), kind, heads, image_size)
        for tensors in sets.values():
            conversion.check({name: tensor.shape for name, tensor in tensors.items()})
            check_positions(tensors[POSITIONS], conversion.backbone, conversion.shape, POSITIONS)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return conversion, {name: tensors.__getitem__ for name, tensors in sets.items()}


def _kind_of(path: Path) -> Kind:
    """SiT or DiT, by the name of the file."""
    match sorted({word.lower() for word in re.findall(r"(?i)(?<![a-z])(?:sit|dit)(?![a-z])", path.name)}):
        case ["sit"]:
            return "sit"
        case ["dit"]:
            return "dit"
    raise ValueError(
        f"{path}: SiT and DiT have the same parameters, so the file does not say which of them it is; "
        "give --kind sit (predicts the velocity) or --kind dit (predicts noise)"
    )


def _describe(tensors: Mapping[str, Tensor], kind: Kind, heads: int | None, image_size: int | None) -> Conversion:
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(get_args(Kind))}")
    name = {"sit": "SiT", "dit": "DiT"}[kind]
    sizes = _sizes(tensors, name)
    side = math.isqrt(tensors[POSITIONS].shape[1]) * sizes.patch
    if image_size not in (None, side):
        raise ValueError(f"image_size {image_size}: its positions are those of samples of side {side}")
    notes = []
    if heads is None:
        heads, assumed = usual_heads(sizes.hidden_size)
        notes.append(assumed)
    notes.append(f"labels: {sizes.num_classes}, and the last row of the table is that of no label")
    notes.append(f"prediction: {PREDICTIONS[kind]}")
    diffusion = {"diffusion": DIFFUSION} if kind == "dit" else {}
    latents = sizes.channels == LATENT_CHANNELS
    return Conversion(
        source=f"{name} checkpoint", backbone=dit_backbone(sizes, heads, time_scale=1.0, **diffusion),
        shape=(sizes.channels, side, side), num_classes=sizes.num_classes, params=dit_params(sizes, LAYERS, TABLE),
        ignored=frozenset({POSITIONS}), vae=DEFAULT_VAE if latents else None, notes=tuple(notes),
        about={"latents": f"scaled by {SCALING}"} if latents else {},
    )  # fmt: skip


def _sizes(tensors: Mapping[str, Tensor], name: str) -> DiTSizes:
    for needed, dimensions in ((PATCHES, 4), (TABLE, 2), (POSITIONS, 3), (HIDDEN, 2), (LAST, 2)):
        if needed not in tensors or tensors[needed].ndim != dimensions:
            what = "is missing" if needed not in tensors else f"has shape {tuple(tensors[needed].shape)}"
            raise ValueError(f"it is no {name} checkpoint: {needed} {what}")
    hidden_size, channels, patch, _ = tensors[PATCHES].shape
    side = math.isqrt(tensors[POSITIONS].shape[1])
    values, rows = patch**2 * channels, len(tensors[LAST])
    impossible = min(hidden_size, values, side) < 1 or hidden_size % 4 or side**2 != tensors[POSITIONS].shape[1]
    if impossible or len(tensors[TABLE]) < 2:
        raise ValueError(f"it is no {name} checkpoint: its patches, positions or labels have impossible sizes")
    if rows not in (values, 2 * values):
        raise ValueError(f"{LAST} has {rows} rows; the patches make it {values}, or {2 * values} with a variance")
    return DiTSizes(
        hidden_size=hidden_size, depth=count_blocks(tensors, "blocks."), mlp_size=len(tensors[HIDDEN]), patch=patch,
        channels=channels, out_channels=rows // patch**2, num_classes=len(tensors[TABLE]) - 1,
    )  # fmt: skip
