"""A run's folder: finding it, what its samples are like, and which weights stand for it.

::

    config.json                  the resolved config
    data.json                    shape and conditions of a sample, so that sampling needs no data
    checkpoints/step_NNNNNNNN/   network, EMAs, optimizer and position
    weights.safetensors          the weights that the config samples with, as a finished run leaves them
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

import shortcutflow
from shortcutflow import checkpoint
from shortcutflow.config import CONFIG_FILE, CURRENT, RunConfig
from shortcutflow.data.source import INFO_FILE, DataInfo
from shortcutflow.io.atomic import atomic_file
from shortcutflow.io.safetensors import read_tensors

RUNS = "runs"
"""The folder of runs, where training is given no other."""
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "weights.safetensors"


class Weights(NamedTuple):
    """Weights of a network.

    Attributes:
        name: an EMA's, "current", or that of the file which they were read from.
        step: optimizer steps done, or None if that is not known.
        tensors: whole ones, by the names of the network's state dict.
    """

    name: str
    step: int | None
    tensors: dict[str, Tensor]


def find_run(path: Path) -> Path:
    """The run at this path: the folder itself, or the newest run inside it.

    Raises:
        FileNotFoundError: if there is none, listing runs nearby.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    inside = sorted(path.glob(f"*/{CONFIG_FILE}"), key=lambda p: p.stat().st_mtime)
    if inside:
        return inside[-1].parent
    if not path.exists():
        nearby = sorted({str(p.parent) for p in path.parent.glob(f"*/{CONFIG_FILE}")})
        hint = f"; runs in the same folder: {', '.join(nearby[:5])}" if nearby else ""
        raise FileNotFoundError(f"there is no run at {path}{hint}")
    raise FileNotFoundError(f"{path} holds no run: no {CONFIG_FILE} in it or in a folder inside it")


def info_of_run(folder: Path, config: RunConfig) -> DataInfo:
    """Shape and conditions of a run's samples, as training wrote them down.

    Raises:
        FileNotFoundError: for a run made before they were written down, if its data is not there either.
        ValueError: for a damaged file.
    """
    try:
        return DataInfo.load(folder) or config.data.describe()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is a run without {INFO_FILE}, so its data says what shape its samples have, and that is not "
            f"here ({error}); where it is, load(RUN).save(FOLDER) writes a model that needs no data"
        ) from error


def read_weights(folder: Path, config: RunConfig, weights: str | None = None) -> Weights:
    """A run's weights: those of its newest checkpoint. Every way of opening a run takes them from here.

    ``weights.safetensors`` is read only where there is no checkpoint: with one it is the same or older.

    Args:
        folder: the run's.
        config: its config.
        weights: an EMA's name or "current"; None takes what the config samples with.

    Raises:
        FileNotFoundError: if the folder holds no such weights.
        ValueError: for unknown weights.
    """
    weights = weights or config.sample_weights
    if weights != CURRENT and weights not in config.emas:
        raise ValueError(f"{folder} has no weights {weights!r}; it has: {', '.join([*config.emas, CURRENT])}")
    newest = checkpoint.latest_in(folder / CHECKPOINTS)
    if newest is not None:
        group = checkpoint.NETWORK if weights == CURRENT else checkpoint.ema_group(weights)
        return Weights(weights, newest.step, newest.tensors(group))
    file = folder / WEIGHTS_FILE
    if file.is_file():
        read = read_weights_file(file, config.sample_weights)
        if read.name == weights:
            return read
    raise FileNotFoundError(f"{folder} has neither a checkpoint nor {WEIGHTS_FILE} with {weights!r} weights")


def write_weights(folder: Path) -> Path:
    """Write the weights that a run samples with, from its newest checkpoint, as one file of whole tensors.

    The config and the data file next to it are all else that sampling needs. Its header says which EMA, step and
    version it is.
    """
    read = read_weights(folder, RunConfig.load(folder))
    header = {"weights": read.name, "step": str(read.step), "shortcutflow": shortcutflow.__version__}
    with atomic_file(folder / WEIGHTS_FILE) as unfinished:
        save_file(read.tensors, unfinished, metadata=header)
    return folder / WEIGHTS_FILE


def read_weights_file(file: Path, name: str) -> Weights:
    """All tensors of a safetensors file; ``name`` is that of the weights where the header says none.

    Raises:
        FileNotFoundError, ValueError: if it is not there, or damaged.
    """
    tensors, header = read_tensors(file, "get it again from where it came from")
    step = header.get("step", "")
    return Weights(header.get("weights", name), int(step) if step.isdigit() else None, tensors)
