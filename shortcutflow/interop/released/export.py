"""From a model's or a run's folder to a checkpoint of the released code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from shortcutflow.config import CURRENT, RunConfig
from shortcutflow.interop.model_folder import ModelConfig, read_config, weights_file
from shortcutflow.interop.released.names import check_names, depth_of, entries, to_theirs
from shortcutflow.interop.released.writer import Read, write_released
from shortcutflow.io.atomic import atomic_output
from shortcutflow.io.safetensors import opened
from shortcutflow.run_dir import info_of_run, read_weights


class _Weights(NamedTuple):
    """Shapes of tensors by name, and how to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def export_jax(folder: Path, out: Path) -> str:
    """Write the weights and their average as a checkpoint that the released code loads; gives what there is to say.

    Adam's state is written anew, all zero: the released code drops it when it loads.

    Args:
        folder: of a model, or of a run of a backbone "dit" with ``released=True`` on images.
        out: the file, which must not exist.

    Raises:
        ValueError: if the network does not have the released code's conventions and parameters.
        FileExistsError: if the file exists.
    """
    config = read_config(folder)
    if not config.backbone.options.get("released"):
        raise ValueError(
            f"{folder} holds a {config.backbone.name!r} of this library's own conventions, which the released code "
            "cannot run; only a DiT with backbone.options.released=true can be exported to it"
        )
    open_sets = _of_run if isinstance(config, RunConfig) else _of_model
    current, average, step, said = open_sets(folder, config)
    with atomic_output(out) as unfinished:
        write_released(
            unfinished, params=_theirs(current, folder), params_ema=_theirs(average, folder), step=step,
            timestamp=_timestamp(config),
        )  # fmt: skip
    return f"{out}: {said}, step {step}; the optimizer's state is new (zeros)"


def _of_model(folder: Path, config: Any) -> tuple[_Weights, _Weights, int, str]:
    averages = [name for name in config.weights if name != CURRENT]
    average = config.default_weights if config.default_weights != CURRENT else (averages or [CURRENT])[0]
    current = CURRENT if CURRENT in config.weights else average
    said = f"params from {current!r}, params_ema from {average!r}"
    return _of_file(folder / weights_file(current)), _of_file(folder / weights_file(average)), config.step or 0, said


def _of_run(folder: Path, config: Any) -> tuple[_Weights, _Weights, int, str]:
    average = config.sample_weights if config.sample_weights != CURRENT else next(iter(config.emas), CURRENT)
    read = [read_weights(folder, config, name) for name in (CURRENT, average)]
    said = f"params from {CURRENT!r}, params_ema from {average!r}"
    # A checkpoint counts updates done; the released code starts at 1.
    return _of_tensors(read[0].tensors), _of_tensors(read[1].tensors), (read[0].step or 0) + 1, said


def _of_file(path: Path) -> _Weights:
    def opened_weights() -> Any:
        return opened(path, "get it again from where it came from", framework="np")

    def read(name: str) -> np.ndarray:
        with opened_weights() as file:
            return np.asarray(file.get_tensor(name))

    with opened_weights() as file:
        return _Weights({name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}, read)


def _of_tensors(tensors: dict[str, Tensor]) -> _Weights:
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    return _Weights({name: array.shape for name, array in arrays.items()}, arrays.__getitem__)


def _theirs(weights: _Weights, folder: Path) -> dict[str, Read]:
    """The released code's arrays by name, each read when it is asked for."""
    wanted = entries(depth_of(weights.shapes, prefix="blocks."))
    try:
        check_names(weights.shapes, {entry.ours for entry in wanted})
    except ValueError as error:
        raise ValueError(f"{folder} holds no network of the released code: {error}") from None
    channels = _channels(folder, weights)
    patch = math.isqrt(weights.shapes["patch_embedding.weight"][1] // channels)
    found: dict[str, Read] = {}
    for entry in wanted:
        for theirs in entry.theirs:
            found[theirs] = lambda entry=entry, theirs=theirs: to_theirs(  # type: ignore[misc]
                entry, weights.read(entry.ours), patch=patch
            )[theirs]
    return found


def _channels(folder: Path, weights: _Weights) -> int:
    """Channels of an image."""
    config = read_config(folder)
    shape = config.shape if isinstance(config, ModelConfig) else info_of_run(folder, config).shape
    if len(shape) != 3:
        raise ValueError(f"{folder} makes samples of shape {shape}; the released code makes images")
    return shape[0]


def _timestamp(config: ModelConfig | RunConfig) -> float:
    """When it was written, if that is known; or 0, so that the same folder always gives the same file."""
    if isinstance(config, ModelConfig):
        try:
            return float(config.about.get("timestamp", 0))
        except ValueError:
            return 0.0
    return 0.0
