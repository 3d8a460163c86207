"""From a checkpoint of the released code to a model's folder, one array after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shortcutflow import __version__
from shortcutflow.config import CURRENT
from shortcutflow.interop.model_folder import ModelConfig, weights_file
from shortcutflow.interop.released.checkpoint import ReleasedCheckpoint, read_released
from shortcutflow.interop.released.names import entries, to_ours
from shortcutflow.interop.released.sizes import (
    Arrays,
    heads_from_moments,
    ignores_step_size,
    usual_heads,
    usual_image_size,
)  # fmt: skip
from shortcutflow.io.atomic import atomic_dir, require_absent
from shortcutflow.io.safetensors import TensorSpec, write_tensors
from shortcutflow.network import BackboneConfig, build_network
from shortcutflow.schedule import levels_of

BACKBONE = "dit"
AVERAGE = "ema"


class Converted(NamedTuple):
    """What became of a checkpoint: the config that was written, and a line for each thing the file does not tell."""

    config: ModelConfig
    notes: tuple[str, ...]


def convert(
    checkpoint: Path, out: Path, *, heads: int | None = None, image_size: int | None = None, finest_steps: int = 128
) -> Converted:
    """Write a released checkpoint's weights and average as a model's folder; needs no JAX, flax or optax.

    Memory stays at a few of the largest arrays, whatever the size of the file.

    Args:
        checkpoint: the pickle.
        out: the folder, which must not exist or be empty; it appears when it is complete.
        heads: of attention; None finds them from the optimizer's gradients, or else by convention.
        image_size: side of a sample, which no array tells; None takes the usual one.
        finest_steps: the training's ``denoise_timesteps``, which no array tells.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such checkpoint, holds numbers that are not finite, or the sizes do not fit.
        FileExistsError: if the folder holds something.
    """
    require_absent(out)
    levels_of(finest_steps)
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"there is no file or folder {checkpoint}; a hub id is owner/name, where no folder owner is here"
        )
    released = read_released(checkpoint)
    config, notes = _config(released, heads, image_size, finest_steps)
    _check_network(config, released)
    with atomic_dir(out) as folder:
        for name, arrays in ((CURRENT, released.params), (AVERAGE, released.params_ema)):
            _write_weights(folder / weights_file(name), arrays, released, name)
        config.save(folder)
    return Converted(config, tuple(notes))


def _config(
    released: ReleasedCheckpoint, heads: int | None, image_size: int | None, finest_steps: int
) -> tuple[ModelConfig, list[str]]:
    sizes, notes = released.sizes, []
    if heads is None and released.moments is not None:
        heads = heads_from_moments(released.params, released.moments, sizes)
    if heads is None:
        heads = usual_heads(sizes.width)
        notes.append(f"heads: {heads}, the usual number for width {sizes.width}; the file does not tell (--heads)")
    if image_size is None:
        image_size = usual_image_size(sizes)
        notes.append(f"image size: {image_size}, the usual one; the file does not tell (--image-size)")
    options: dict[str, Any] = {
        "width": sizes.width, "depth": sizes.depth, "heads": heads, "patch": sizes.patch,
        "mlp_ratio": sizes.hidden / sizes.width, "released": True,
    }  # fmt: skip
    if ignores := released.moments is not None and ignores_step_size(released.moments):
        options["ignore_step_size"] = True
        notes.append("step size: training never told it to the network (a flow model or another baseline)")
    about = {"source": f"converted from a checkpoint of the released code, {released.path.name}"}
    if notes:
        about["assumed"] = "; ".join(notes)
    config = ModelConfig(
        backbone=BackboneConfig(name=BACKBONE, options=options),
        shape=(sizes.channels, image_size, image_size), num_classes=sizes.num_classes, null_y=sizes.num_classes,
        finest_steps=finest_steps, flow_only=ignores, weights=(CURRENT, AVERAGE), default_weights=AVERAGE,
        step=released.step, about=about | {"timestamp": repr(released.timestamp)},
    )  # fmt: skip
    return config, notes


def _check_network(config: ModelConfig, released: ReleasedCheckpoint) -> None:
    """Build the network without memory: what does not fit is found before anything is written."""
    import torch

    with torch.device("meta"):
        network = build_network(
            config.backbone,
            shape=config.shape,
            num_classes=config.num_classes,
            finest_steps=config.finest_steps,
            seed=0,
        )
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if expected != _shapes(released.params, released.sizes.depth):
        raise ValueError(f"{released.path}: the installed backbone {BACKBONE!r} has other parameters than the file")


def _shapes(arrays: Arrays, depth: int) -> dict[str, tuple[int, ...]]:
    """Of our parameters, by name."""
    shapes = {}
    for ours, theirs, kind in entries(depth):
        first = arrays[theirs[0]].shape
        if kind == "kernel":
            first = (first[-1], int(np.prod(first[:-1])))
        shapes[ours] = (first[0] * len(theirs), *first[1:])
    return shapes


def _write_weights(path: Path, arrays: Arrays, released: ReleasedCheckpoint, name: str) -> None:
    def finite(theirs: str) -> np.ndarray:
        array = arrays[theirs].read()
        if not np.isfinite(array).all():
            raise ValueError(f"{released.path}: {theirs} of the weights {name!r} holds numbers that are not finite")
        return array

    depth = released.sizes.depth
    write_tensors(
        path, {ours: TensorSpec(shape) for ours, shape in _shapes(arrays, depth).items()}, _converted(depth, finite),
        metadata={"weights": name, "step": str(released.step), "shortcutflow": __version__},
    )  # fmt: skip


def _converted(depth: int, read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    for entry in entries(depth):
        yield entry.ours, torch.from_numpy(to_ours(entry, read))
