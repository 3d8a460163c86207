"""Checkpoints that are whole or not there: safetensors and JSON in a folder that is renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "state.json"
NETWORK = "network"
OPTIMIZER = "optimizer"
_PREFIX = "step_"


class Checkpoint(NamedTuple):
    """One saved state: the folder and the optimizer steps done when it was written."""

    folder: Path
    step: int

    def tensors(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of a group: "network", "optimizer", or "average_NAME".

        Raises:
            FileNotFoundError: if the checkpoint has no such group, listing those it has.
        """
        path = self.folder / f"{group}.safetensors"
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors")))
            raise FileNotFoundError(f"{self.folder} holds no {group!r}; it holds: {there}")
        return load_file(path, device=str(device))

    def state(self) -> dict[str, Any]:
        """What is not a tensor: step, images seen, data position, versions."""
        return json.loads((self.folder / STATE).read_text())


def average_group(name: str) -> str:
    """The group that holds the average of this name."""
    return f"average_{name}"


def save(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint below ``folder``; whatever interrupts it, a half-written one never counts as one.

    Everything goes into a folder of another name and onto the disk first; renaming it is the last act.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    unfinished = folder / f".unfinished_{step:08d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for group, tensors in groups.items():
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, unfinished / f"{group}.safetensors")
    (unfinished / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    for file in unfinished.iterdir():
        _sync(file)
    _sync(unfinished)
    if final.exists():
        shutil.rmtree(final)
    unfinished.replace(final)
    _sync(folder)
    return Checkpoint(final, step)


def _sync(path: Path) -> None:
    """Force a file or folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_in(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints below a folder, oldest first."""
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        digits = path.name.removeprefix(_PREFIX)
        if digits.isdigit() and (path / STATE).is_file():
            found.append(Checkpoint(path, int(digits)))
    return sorted(found, key=lambda c: c.step)


def latest_in(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint below a folder, if there is one."""
    found = all_in(folder)
    return found[-1] if found else None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for checkpoint in all_in(folder)[:-keep]:
        shutil.rmtree(checkpoint.folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name, ``NAME/exp_avg`` and so on."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved tensors back, exactly.

    Raises:
        ValueError: if they belong to other parameters.
    """
    parameters = dict(network.named_parameters())
    loaded: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        loaded.setdefault(parameter_name, {})[key] = value
    trained = {name for name, p in parameters.items() if p.requires_grad}
    if loaded and loaded.keys() != trained:
        wrong = sorted(loaded.keys() ^ trained)
        raise ValueError(f"the optimizer state belongs to another network; parameters that differ: {', '.join(wrong)}")
    for name, values in loaded.items():
        optimizer.state[parameters[name]] = values
