"""Checkpoints that are whole or not there, written beside training by any number of processes, read by any other.

PyTorch's distributed checkpoint writes each process's part of every tensor as safetensors, into a folder that gets its
final name when all of it, and ``state.json``, is on the disk. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shortcutflow.io.atomic import sync, sync_tree
from shortcutflow.io.json import read_object
from shortcutflow.train.staging import scalars_on_cpu, share

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.staging import AsyncStager

STATE = "state.json"
NETWORK = "network"
OPTIMIZER = "optimizer"
TEACHER = "teacher"
_PREFIX = "step_"
_UNFINISHED = ".unfinished_"
LARGEST_STATE = 2**26
ALONE = "torch.distributed is disabled"
"""How PyTorch's warning begins that one process saves or loads alone, which is meant."""


class SavingError(RuntimeError):
    """A checkpoint could not be written, naming the last one that is whole."""


class Checkpoint(NamedTuple):
    """One saved state: the folder and the optimizer steps done when it was written."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """What is not a tensor: step, images seen, data position, versions."""
        remedy = "remove this checkpoint's folder, and the one before it is taken"
        return read_object(self.folder / STATE, "a checkpoint", longest=LARGEST_STATE, remedy=remedy)

    def tensors(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The whole tensors of a group: "network", "optimizer", or "average_NAME".

        Raises:
            FileNotFoundError: if the checkpoint has no such group, listing those it has.
        """
        known = self._metadata()
        wanted = {
            name.removeprefix(f"{group}/"): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in known.items()
            if name.startswith(f"{group}/")
        }
        if not wanted:
            there = ", ".join(sorted({name.partition("/")[0] for name in known}))
            raise FileNotFoundError(f"{self.folder} holds no {group!r}; it holds: {there}")
        self._fill(_flat({group: wanted}), known, alone=True)
        return {name: tensor.to(device) for name, tensor in wanted.items()}

    def restore(
        self, groups: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer, network: nn.Module
    ) -> None:
        """Fill the tensors that training works on, sharded or not, with what was saved under their names.

        Every process must call it, with its own parts.

        Args:
            groups: tensors by group and name.
            optimizer: gets its state for each parameter that had one when it was saved.
            network: whose parameters the optimizer has.

        Raises:
            ValueError: if a tensor was not saved or has another shape, naming it.
        """
        known = self._metadata()
        state = _room_for_state(network, known)
        self._fill(_flat({**groups, OPTIMIZER: state}), known)
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            parameter, _, key = name.rpartition("/")
            by_name.setdefault(parameter, {})[key] = tensor
        # The optimizer numbers its parameters through its groups.
        names = _names(network)
        numbered = enumerate(names[p] for group in optimizer.param_groups for p in group["params"])
        states = {number: by_name[name] for number, name in numbered if name in by_name}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    def _fill(self, flat: dict[str, Any], known: Mapping[str, TensorStorageMetadata], *, alone: bool = False) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        for name, tensor in flat.items():
            if name not in known:
                raise ValueError(f"{self.folder} holds no {name!r}: it belongs to another network or other EMAs")
            if known[name].size != tensor.shape:
                raise ValueError(f"{self.folder}: {name!r} is {tuple(known[name].size)}, here {tuple(tensor.shape)}")
        alone = alone or not _in_group()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=ALONE)
                load(flat, storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=alone)
        except CheckpointException as error:
            raise ValueError(f"{self.folder} cannot be read: {_cause(error)}") from error

    def _metadata(self) -> dict[str, TensorStorageMetadata]:
        """Shape and type of each saved tensor, by its name in full.

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


def ema_group(name: str) -> str:
    """The group that holds the EMA of this name."""
    return f"average_{name}"


class Saver:
    """Writes a run's checkpoints, one at a time, while training goes on.

    Args:
        folder: of the checkpoints.
        first: whether this process gives the folders their final names.
        group: through which the processes agree; None for one process.
        keep: how many of the newest to keep.
        keep_every: and those at multiples of so many steps; 0: none of them.
    """

    def __init__(
        self, folder: Path, *, first: bool = True, group: ProcessGroup | None = None, keep: int = 2, keep_every: int = 0
    ) -> None:
        self.folder, self._first, self._group = folder, first, group
        self._keep, self._keep_every = keep, keep_every
        self._pending: Future[None] | None = None
        self._stager: AsyncStager | None = None
        self._leaving = ExitStack()

    def __enter__(self) -> Saver:
        # For as long as it saves, since the warning comes from the writing thread.
        self._leaving.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=ALONE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        with self._leaving:
            # What is being written is finished however training ends; its failure must not hide another.
            if kind is None:
                self.wait()
            elif self._pending is not None:
                self._pending.exception()

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; returns as soon as its tensors are copied, so they may change at once.

        Raises:
            SavingError: if the one before could not be written.
        """
        from torch.distributed.checkpoint.state_dict_saver import async_save

        from shortcutflow.train.shard_writer import ShardWriter  # loaded here: it takes a second

        self.wait()
        unfinished = self.folder / f"{_UNFINISHED}{step:08d}"
        if self._first:
            # What a killed run left, under this or another step's name.
            for left in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)
        if self._group is not None:
            torch.distributed.barrier(self._group)
        written: Any = async_save(
            self._staged_here(_flat(groups)), storage_writer=ShardWriter(unfinished), process_group=self._group,
            no_dist=self._group is None, async_stager=self._stager,
        )  # fmt: skip
        written = getattr(written, "upload_completion", written)
        self._pending = Future()
        # Runs in the writing thread: what was written gets its name also if training waits for something else.
        written.add_done_callback(lambda done: self._finish(done, step, unfinished, {"step": step, **state}))

    def _staged_here(self, flat: dict[str, Any]) -> dict[str, Any]:
        """What this process copies and writes; and, for a GPU, how: into pinned memory, with one wait for all."""
        if self._group is not None:
            flat = share(flat, torch.distributed.get_rank(self._group), torch.distributed.get_world_size(self._group))
        if not any(tensor.is_cuda for tensor in flat.values()):
            return flat
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            # Kept for the run: it reuses its pinned memory, which takes long to get.
            options = StagingOptions(use_shared_memory=False, use_async_staging=False)
            stager = self._stager = DefaultStager(options)
            self._leaving.callback(stager.close)
        return flat | scalars_on_cpu(flat)

    def wait(self) -> None:
        """Until nothing is being written any more.

        Raises:
            SavingError: if it could not be written.
        """
        if self._pending is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            self._pending.result()
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            last = latest_in(self.folder)
            whole = f"the last whole checkpoint is {last.folder}" if last else "there is no checkpoint before it"
            raise SavingError(f"a checkpoint could not be written ({_cause(error)}); {whole}") from error
        finally:
            self._pending = None

    def _finish(self, done: Future[Any], step: int, unfinished: Path, state: dict[str, Any]) -> None:
        assert self._pending is not None
        try:
            done.result()
            if self._first:
                self._name(step, unfinished, state)
            self._pending.set_result(None)
        except BaseException as error:
            # Room for whatever comes next; what is whole stays.
            shutil.rmtree(unfinished, ignore_errors=True)
            self._pending.set_exception(error)

    def _name(self, step: int, unfinished: Path, state: dict[str, Any]) -> None:
        """Everything is forced onto the disk; the final name is the last act."""
        files = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
        (unfinished / STATE).write_text(json.dumps(state | {"files": files}, indent=2) + "\n")
        sync_tree(unfinished)
        final = folder_of(self.folder, step)
        if final.exists():
            shutil.rmtree(final)
        unfinished.replace(final)
        sync(self.folder)
        for checkpoint in all_in(self.folder)[: -self._keep]:
            if not self._keep_every or checkpoint.step % self._keep_every:
                shutil.rmtree(checkpoint.folder)


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or will."""
    return checkpoints / f"{_PREFIX}{step:08d}"


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


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name, for AdamW ``NAME/exp_avg`` and so on.

    A parameter that has not had a step yet has none.
    """
    names = _names(network)
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _room_for_state(network: nn.Module, known: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Empty tensors for all that was saved of the optimizer's state; laid out as the parameter if shaped like it."""
    room: dict[str, Tensor] = {}
    parameters = dict(network.named_parameters())
    for full_name, saved in known.items():
        group, _, name = full_name.partition("/")
        parameter = parameters.get(name.rpartition("/")[0])
        if group == OPTIMIZER and parameter is not None:
            dtype = saved.properties.dtype
            if saved.size == parameter.shape:
                room[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            else:
                room[name] = torch.empty(saved.size, dtype=dtype)
    return room


def _names(network: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in network.named_parameters()}


def _flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _cause(error: BaseException) -> str:
    """The first exception of a rank, out of what the distributed checkpoint wraps around it."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {cause}"
    return str(error)
