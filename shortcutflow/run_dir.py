"""A run's folder: finding it, what its samples are like, and which weights stand for it.

::

    config.json                  the resolved config
    data.json                    shape and conditions of a sample, so that sampling needs no data
    checkpoints/step_NNNNNNNN/   network, EMAs, optimizer and position
    weights.safetensors          the weights that the config samples with, as a finished run leaves them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import shortcutflow
from shortcutflow import checkpoint
from shortcutflow.config import CONFIG_FILE, CURRENT, RunConfig
from shortcutflow.data.source import INFO_FILE, DataInfo
from shortcutflow.io.atomic import atomic_file
from shortcutflow.io.safetensors import read_tensors

CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "weights.safetensors"


class RunWeights(NamedTuple):
    """Weights of a run: an EMA's name or "current", optimizer steps done if known, whole tensors by name."""

    name: str
    step: int | None
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A run's network, ready to sample.

    Attributes:
        folder: the run's folder.
        config: its resolved config.
        info: shape and conditions of its samples.
        step: optimizer steps done, or None if that is not known.
        weights: the EMA's name, "current", or a file's name.
        network: in eval mode.
    """

    folder: Path
    config: RunConfig
    info: DataInfo
    step: int | None
    weights: str
    network: nn.Module


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
        hint = f"; runs beside it: {', '.join(nearby[:5])}" if nearby else ""
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


def read_weights(folder: Path, config: RunConfig, weights: str | None = None) -> RunWeights:
    """A run's weights: those of its newest checkpoint. Every way of opening a run takes them from here.

    ``weights.safetensors`` is read only where there is no checkpoint: beside one it is the same or older.

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
        return RunWeights(weights, newest.step, newest.tensors(group))
    file = folder / WEIGHTS_FILE
    if file.is_file():
        tensors, header = read_tensors(file, "get it again from where it came from")
        if header.get("weights", config.sample_weights) == weights:
            return RunWeights(weights, _step_of(header), tensors)
    raise FileNotFoundError(f"{folder} has neither a checkpoint nor {WEIGHTS_FILE} with {weights!r} weights")


def write_weights(folder: Path) -> Path:
    """Write the weights that a run samples with, from its newest checkpoint, as one file of whole tensors.

    Config and data file beside it are all else that sampling needs. Its header says which EMA, step and version
    it is.
    """
    read = read_weights(folder, RunConfig.load(folder))
    header = {"weights": read.name, "step": str(read.step), "shortcutflow": shortcutflow.__version__}
    with atomic_file(folder / WEIGHTS_FILE) as unfinished:
        save_file(read.tensors, unfinished, metadata=header)
    return folder / WEIGHTS_FILE


def load_run(path: Path, *, weights: str | None = None, device: torch.device | str = "cpu") -> Run:
    """A run's network with the weights of :func:`read_weights`, or of a file.

    Args:
        path: its folder, or one that holds runs (the newest is taken).
        weights: as of :func:`read_weights`, or a safetensors file of whole tensors.
        device: of the network.

    Raises:
        FileNotFoundError: without a run or its weights.
        ValueError: for unknown weights, or a file of another network's.
    """
    folder = find_run(path)
    config = RunConfig.load(folder)
    if weights is not None and weights.endswith(".safetensors"):
        tensors, header = read_tensors(Path(weights), "make it again")
        read, source = RunWeights(Path(weights).name, _step_of(header), tensors), Path(weights)
    else:
        read, source = read_weights(folder, config, weights), folder
    info = info_of_run(folder, config)
    network = config.build_network(info)
    try:
        network.load_state_dict(read.tensors)
    except RuntimeError as error:
        raise ValueError(f"{source} does not hold the weights of this run's network: {error}") from error
    return Run(folder, config, info, read.step, read.name, network.to(device).eval())


def _step_of(header: dict[str, str]) -> int | None:
    step = header.get("step", "")
    return int(step) if step.isdigit() else None
