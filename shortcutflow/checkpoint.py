"""Checkpoints: whole or not there, written by any number of ranks, read by any other number.

PyTorch's distributed checkpoint in safetensors, each rank's shards of every tensor, beside ``state.json``. Nothing is
pickled. ``train/checkpoint_writer.py`` writes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shortcutflow.io.json import read_object

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

STATE = "state.json"
NETWORK = "network"
OPTIMIZER = "optimizer"
TEACHER = "teacher"
PREFIX = "step_"
LARGEST_STATE = 2**26
"""Bytes of a state.json that is still read."""


class Checkpoint(NamedTuple):
    """One saved state: the folder, and the optimizer steps done when it was written."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """All that is not a tensor: step, images seen, data position, config, versions."""
        remedy = "remove this checkpoint's folder, and the one before it is taken"
        return read_object(self.folder / STATE, "a checkpoint", longest=LARGEST_STATE, remedy=remedy)

    def tensors(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The full tensors of a group: "network", "optimizer", "teacher", or that of :func:`ema_group`.

        Raises:
            FileNotFoundError: if the checkpoint has no such group, listing those it has.
        """
        saved = self._metadata()
        found = {
            name.removeprefix(f"{group}/"): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in saved.items()
            if name.startswith(f"{group}/")
        }
        if not found:
            groups = ", ".join(sorted({name.partition("/")[0] for name in saved}))
            raise FileNotFoundError(f"{self.folder} holds no {group!r}; it holds: {groups}")
        self._load(flattened({group: found}), saved, alone=True)
        return {name: tensor.to(device) for name, tensor in found.items()}

    def restore(
        self, groups: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer, network: nn.Module
    ) -> None:
        """Load the tensors that training works on, sharded or not, by group and name; every rank must call it.

        Args:
            groups: tensors by group and name, filled in place.
            optimizer: gets its state for each parameter that had one when it was saved.
            network: whose parameters the optimizer has.

        Raises:
            ValueError: if a tensor was not saved or has another shape, naming it.
        """
        saved = self._metadata()
        state = _empty_optimizer_state(network, saved)
        self._load(flattened({**groups, OPTIMIZER: state}), saved)
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            parameter, _, key = name.rpartition("/")
            by_parameter.setdefault(parameter, {})[key] = tensor
        # In a state_dict, parameters are numbered through the optimizer's groups.
        names = {parameter: name for name, parameter in network.named_parameters()}
        in_order = (names[p] for group in optimizer.param_groups for p in group["params"])
        states = {i: by_parameter[name] for i, name in enumerate(in_order) if name in by_parameter}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    def _load(
        self, tensors: dict[str, Any], saved: Mapping[str, TensorStorageMetadata], *, alone: bool = False
    ) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        for name, tensor in tensors.items():
            if name not in saved:
                raise ValueError(f"{self.folder} holds no {name!r}: it belongs to another network or other EMAs")
            if saved[name].size != tensor.shape:
                raise ValueError(f"{self.folder}: {name!r} is {tuple(saved[name].size)}, here {tuple(tensor.shape)}")
        alone = alone or not (torch.distributed.is_available() and torch.distributed.is_initialized())
        try:
            with warnings.catch_warnings():
                # One process that loads alone is meant.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(tensors, storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=alone)
        except CheckpointException as error:
            (rank, (cause, _)), *_ = error.failures.items()
            raise ValueError(f"{self.folder} cannot be read: rank {rank}: {cause}") from error

    def _metadata(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of each saved tensor, by its full name.

        Raises:
            ValueError: if a file is missing or cut off: PyTorch would leave the tensors' parts in it as they are.
        """
        from safetensors import SafetensorError
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        for name, size in self.state().get("files", {}).items():
            file = self.folder / name
            if not file.is_file():
                raise ValueError(f"{self.folder} is damaged: {name} is missing")
            if file.stat().st_size != size:
                raise ValueError(f"{self.folder} is damaged: {name} has {file.stat().st_size} bytes instead of {size}")
        try:
            found: Any = HuggingFaceStorageReader(str(self.folder)).read_metadata().state_dict_metadata
        except SafetensorError as error:
            raise ValueError(f"{self.folder} is damaged: {error}") from error
        return found


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints / f"{PREFIX}{step:08d}"


def all_in(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints below a folder, oldest first."""
    paths = [path for path in folder.glob(f"{PREFIX}*") if (path / STATE).is_file()]
    steps = {path: path.name.removeprefix(PREFIX) for path in paths}
    return sorted((Checkpoint(path, int(step)) for path, step in steps.items() if step.isdigit()), key=lambda c: c.step)


def latest_in(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint below a folder, if there is one."""
    found = all_in(folder)
    return found[-1] if found else None


def ema_group(name: str) -> str:
    """The group that holds the EMA of this name."""
    return f"average_{name}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name, for AdamW ``NAME/exp_avg`` and so on.

    A parameter that has not had a step yet has none.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _empty_optimizer_state(network: nn.Module, saved: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Empty tensors for all that was saved of the optimizer's state; sharded as the parameter if shaped like it."""
    state: dict[str, Tensor] = {}
    parameters = dict(network.named_parameters())
    for full_name, entry in saved.items():
        group, _, name = full_name.partition("/")
        parameter = parameters.get(name.rpartition("/")[0])
        if group == OPTIMIZER and parameter is not None:
            like = parameter if entry.size == parameter.shape else torch.empty(entry.size)
            state[name] = torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
    return state


def flattened(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Tensors of several groups by ``GROUP/NAME``."""
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
