"""Opening a finished or running run to sample from it: no flag needed, the config lies beside the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import shortcutflow
from shortcutflow.config import CONFIG_FILE, CURRENT, RunConfig
from shortcutflow.data.source import DataInfo
from shortcutflow.io.atomic import atomic_file, write_whole
from shortcutflow.io.safetensors import read_tensors
from shortcutflow.train import checkpoint
from shortcutflow.train.checkpoint import NETWORK, Checkpoint, average_group

CHECKPOINTS = "checkpoints"
REPORT_FILE = "evaluation.json"
PICTURE_FILE = "samples.png"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class Run:
    """A run's network, ready to sample.

    Attributes:
        folder: the run's folder.
        config: its resolved config.
        step: optimizer steps done.
        weights: the average's name, or "current".
        network: in eval mode.
    """

    folder: Path
    config: RunConfig
    step: int
    weights: str
    network: nn.Module

    @cached_property
    def info(self) -> DataInfo:
        """What its data is; see :meth:`~shortcutflow.config.RunConfig.data_info`."""
        return self.config.data_info(self.folder)


def write_report(run: Run, *, protocol: str, rows: Sequence[Any], **measured: object) -> None:
    """Write what was measured into the run's folder, with what is needed to repeat it.

    Args:
        run: what was measured.
        protocol: how, in words.
        rows: a dataclass a sampling budget.
        measured: further findings.
    """
    settings = run.config.evaluation
    report = {
        "protocol": protocol,
        "settings": settings.model_dump() if settings else None,
        "weights": run.weights,
        "step": run.step,
        "seed": run.config.seed,
        **measured,
        "rows": [asdict(row) for row in rows],
        "versions": {"shortcutflow": shortcutflow.__version__, "torch": torch.__version__},
    }
    write_whole(run.folder / REPORT_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


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


def write_weights(folder: Path) -> Path:
    """Write the weights that a run samples with, from its newest checkpoint, as one file of whole tensors.

    Whoever wants to sample needs this file and the config. Its header says which average, step and version it is.
    """
    config = RunConfig.load(folder)
    newest = _newest(folder)
    header = {"weights": config.sample_weights, "step": str(newest.step), "shortcutflow": shortcutflow.__version__}
    tensors = newest.tensors(_group(config.sample_weights))
    with atomic_file(folder / WEIGHTS_FILE) as unfinished:
        save_file(tensors, unfinished, metadata=header)
    return folder / WEIGHTS_FILE


def _newest(folder: Path) -> Checkpoint:
    newest = checkpoint.latest_in(folder / CHECKPOINTS)
    if newest is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    return newest


def _group(weights: str) -> str:
    return NETWORK if weights == CURRENT else average_group(weights)


def _with_weights_of_file(folder: Path, config: RunConfig, path: Path, device: torch.device | str) -> Run:
    network = config.build_network(config.data_info(folder))
    tensors, header = read_tensors(path, "make it again")
    step = header.get("step", "")
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold this run's weights: {error}") from error
    return Run(folder, config, int(step) if step.isdigit() else 0, path.name, network.to(device).eval())


def load_run(path: Path, *, weights: str | None = None, device: torch.device | str = "cpu") -> Run:
    """Load a run's network from its newest checkpoint.

    Args:
        path: its folder, or one that holds runs (the newest is taken).
        weights: an average's name or "current", or a safetensors file of whole tensors; None takes what the run's
            config samples with.

    Raises:
        FileNotFoundError: without a run or a checkpoint.
        ValueError: for unknown weights.
    """
    folder = find_run(path)
    config = RunConfig.load(folder)
    weights = weights or config.sample_weights
    if weights.endswith(".safetensors"):
        return _with_weights_of_file(folder, config, Path(weights), device)
    if weights != CURRENT and weights not in config.averages:
        raise ValueError(f"unknown weights {weights!r}; this run has: {', '.join([*config.averages, CURRENT])}")
    newest = _newest(folder)
    network = config.build_network(config.data_info(folder))
    network.load_state_dict(newest.tensors(_group(weights)))
    return Run(folder, config, newest.step, weights, network.to(device).eval())
