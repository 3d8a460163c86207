"""The checkpoints of the authors' JAX code, checked, and their parameters under the names of the backbone "dit".

Dense kernels are (in, out); a block's Dense_2, Dense_1 and Dense_3 are query, key and value; the patch convolution's
kernel is (row, column, in, out); the final channels of a patch are ordered (row, column, channel).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shortcutflow.interop.conversion import (
    PAPER_HEADS,
    TIME_FEATURES,
    Conversion,
    DiTSizes,
    ParamSource,
    ReadTensor,
    count_blocks,
    dit_backbone,
    dit_params,
    usual_heads,
)
from shortcutflow.interop.jax_pickle import AdamState, StoredArray, load_pickle

CHECKPOINT = "checkpoint of the authors' JAX code"
PATCHES, LABELS = "PatchEmbed_0/Conv_0", "LabelEmbedder_0/Embed_0/embedding"
STEP_EMBEDDING = "TimestepEmbedder_1/Dense_0/kernel"
MLP = "DiTBlock_0/MlpBlock_0/Dense_0/bias"
LOG_VARIANCES = 256
"""Rows of a table that the authors' network holds and never reads."""
LAYERS: dict[str, str | tuple[str, ...]] = {
    "patch_embedding": PATCHES,
    "condition.time.hidden": "TimestepEmbedder_0/Dense_0",
    "condition.time.out": "TimestepEmbedder_0/Dense_1",
    "condition.step.hidden": "TimestepEmbedder_1/Dense_0",
    "condition.step.out": "TimestepEmbedder_1/Dense_1",
    "head.modulation": "FinalLayer_0/Dense_0",
    "head.out": "FinalLayer_0/Dense_1",
    "blocks.{i}.modulation": "DiTBlock_{i}/Dense_0",
    "blocks.{i}.mixer.qkv": tuple(f"DiTBlock_{{i}}/Dense_{j}" for j in (2, 1, 3)),
    "blocks.{i}.mixer.out": "DiTBlock_{i}/Dense_4",
    "blocks.{i}.mlp.0": "DiTBlock_{i}/MlpBlock_0/Dense_0",
    "blocks.{i}.mlp.2": "DiTBlock_{i}/MlpBlock_0/Dense_1",
}
"""Linear layers of the backbone "dit", and of these checkpoints."""


def read_jax_checkpoint(
    path: Path, *, heads: int | None = None, image_size: int | None = None
) -> tuple[Conversion, dict[str, ReadTensor]]:
    """What a checkpoint holds, its weights ("current") and their EMA ("ema"); their numbers are still in the file.

    Heads and the side of a sample are in no array; None takes the usual ones.

    Raises:
        ValueError: with one line that says what is wrong with the file.
    """
    value = load_pickle(path)
    try:
        state = _with_keys("the file", value, "train_state", "_timestamp")["train_state"]
        _with_keys("train_state", state, "params", "params_ema", "opt_state", "step")
        if not isinstance(value["_timestamp"], float) or not math.isfinite(value["_timestamp"]):
            raise ValueError("_timestamp must be a finite number of seconds")
        step = state["step"]
        if isinstance(step, StoredArray) and step.shape == () and step.dtype.kind in "iu":
            step = int(step.read())
        if type(step) is not int or step < 0:
            raise ValueError("step must be a whole number, not negative")
        sets = {key: dict(_flat(state[key], key)) for key in ("params", "params_ema")}
        sizes = sizes_of({name: array.shape for name, array in sets["params"].items()})
        ignores_step_size, notes, options = _ignores_step_size(state["opt_state"]), [], {"released": True}
        if heads is None:
            heads, assumed = usual_heads(sizes.hidden_size)
            notes.append(assumed)
        if image_size is None:
            image_size = _usual_image_size(sizes)
            notes.append(f"image size: {image_size}, the usual one; the file does not say (--image-size)")
        if ignores_step_size:
            options["ignore_step_size"] = True
            notes.append("step size: training never gave it to the network (a flow model or another baseline)")
        conversion = Conversion(
            source=CHECKPOINT, backbone=dit_backbone(sizes, heads, **options),
            shape=(sizes.channels, image_size, image_size), num_classes=sizes.num_classes, params=params_of(sizes),
            step_conditioned=not ignores_step_size, step=step, notes=tuple(notes),
            about={"timestamp": repr(value["_timestamp"])},
        )  # fmt: skip
        for key, arrays in sets.items():
            conversion.check({name: array.shape for name, array in arrays.items()}, f"{key}: ")
            for name, array in arrays.items():
                if array.dtype.newbyteorder("=") != "float32":
                    raise ValueError(f"{key}: {name} must be float32, it is {array.dtype}")
    except ValueError as error:
        raise ValueError(f"{path} is no {CHECKPOINT}: {error}") from None
    return conversion, {"current": _reader(sets["params"]), "ema": _reader(sets["params_ema"])}


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> DiTSizes:
    """The sizes, which all names and shapes are checked against then."""
    for name, dimensions in ((f"{PATCHES}/kernel", 4), (LABELS, 2), (MLP, 1)):
        if name not in shapes or len(shapes[name]) != dimensions:
            raise ValueError(f"{name} is missing or has not {dimensions} dimensions")
    patch, _, channels, hidden_size = shapes[f"{PATCHES}/kernel"]
    # No more blocks than there are parameters for, 14 each: a made-up file may name any number.
    depth = min(count_blocks(shapes, "DiTBlock_"), len(shapes) // 14)
    mlp_size, classes = shapes[MLP][0], shapes[LABELS][0] - 1
    sizes = DiTSizes(hidden_size, depth, mlp_size, patch, channels, channels, classes)
    if min(sizes) < 1 or hidden_size % 4:
        raise ValueError(f"sizes must be at least 1, and the hidden size a multiple of 4: {sizes}")
    return sizes


def params_of(sizes: DiTSizes) -> dict[str, ParamSource]:
    """Where each parameter of the backbone comes from."""
    params = dit_params(sizes, LAYERS, LABELS, weight="/kernel", bias="/bias", transposed=True)
    return params | {"log_variances": ParamSource(("Embed_0/embedding",), (LOG_VARIANCES, 1))}


def _reader(arrays: Mapping[str, StoredArray]) -> ReadTensor:
    return lambda name: torch.from_numpy(arrays[name].read())


def _with_keys(what: str, value: Any, *keys: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        found = ", ".join(repr(key)[:40] for key in list(value)[:5]) if isinstance(value, dict) else "something else"
        raise ValueError(f"{what} must be a dictionary of exactly {', '.join(keys)}; it has {found or 'nothing'}")
    return value


def _flat(tree: Any, what: str, prefix: str = "") -> Iterator[tuple[str, StoredArray]]:
    """Arrays of nested dictionaries by their names joined with '/'."""
    if isinstance(tree, StoredArray) and prefix:
        yield prefix, tree
        return
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{what} must hold arrays in nested dictionaries; {prefix or 'it'} is something else")
    for key, part in tree.items():
        # A slash in a key would make two different trees look the same.
        if not key or "/" in key:
            raise ValueError(f"{what} has a key {key!r}; names of parameters are not empty and have no slash")
        yield from _flat(part, what, f"{prefix}/{key}" if prefix else key)


def _ignores_step_size(opt_state: Any) -> bool:
    """Whether training never gave the network a step size, as the authors' baselines do.

    The embedding's last 128 features are sines of the level log2(1/d); the mean gradient of their weights, which Adam
    keeps, is exactly zero if the level was always 0, and only then.
    """
    if not isinstance(opt_state, tuple):
        raise ValueError("opt_state must be a tuple of optax's states")
    for state in opt_state:
        if isinstance(state, AdamState) and len(state) == 3:
            gradients = dict(_flat(state[1], "opt_state's mu"))
            if STEP_EMBEDDING not in gradients or gradients[STEP_EMBEDDING].shape[:1] != (TIME_FEATURES,):
                raise ValueError(f"opt_state's mu has no {STEP_EMBEDDING} of {TIME_FEATURES} rows")
            cosines, sines = (part.any() for part in gradients[STEP_EMBEDDING].read().reshape(2, -1))
            return bool(cosines and not sines)
        if type(state) is tuple and _ignores_step_size(state):
            return True
    return False


def _usual_image_size(sizes: DiTSizes) -> int:
    """Side of a sample by convention: 32 for latents and 256 for images at the DiT paper's sizes; else small."""
    if sizes.hidden_size not in PAPER_HEADS:
        return max(8, 4 * sizes.patch)
    return 32 if sizes.channels == 4 else 256
