"""Writes checkpoints while training goes on: a folder gets its name when all of it is on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from shortcutflow.checkpoint import STATE, all_in, flattened, folder_of, latest_in
from shortcutflow.dtensor import is_sharded
from shortcutflow.io.atomic import sync, sync_tree
from shortcutflow.io.safetensors import TensorSpec, write_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.staging import DefaultStager

UNFINISHED = ".unfinished_"
SHARD_OFFSETS = "DCP_SHARDING_INFO"
"""The entry of a file's header where PyTorch's reader looks for the offset of each shard in its tensor."""


class SavingError(RuntimeError):
    """A checkpoint could not be written, naming the last one that is whole."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, while training goes on.

    Args:
        folder: of the checkpoints.
        group: of all ranks, on the CPU; used for nothing else. None for one process.
        keep: how many of the newest to keep.
        keep_every: also keep those at multiples of so many steps; 0: none of them.
    """

    def __init__(self, folder: Path, *, group: ProcessGroup | None = None, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self._group, self._keep, self._keep_every = folder, group, keep, keep_every
        self._rank = torch.distributed.get_rank(group) if group is not None else 0
        self._size = torch.distributed.get_world_size(group) if group is not None else 1
        # One thread, so that what was begun first is written first.
        self._thread = ThreadPoolExecutor(1)
        self._checkpoint: Future[None] | None = None
        self._others: list[Future[object]] = []
        self._stager: DefaultStager | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # What is being written is finished however training ends; its failure must not hide another.
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; returns as soon as its tensors are copied, so they may change at once.

        Raises:
            SavingError: if the one before could not be written.
        """
        self._wait_for([self._checkpoint])
        unfinished = self.folder / f"{UNFINISHED}{step:08d}"
        if self._rank == 0:
            # Left by a killed run, under this or another step's name.
            for left in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)
        if self._group is not None:
            torch.distributed.barrier(self._group)
        copied = self._copied(tensors_of_rank(flattened(groups), self._rank, self._size))
        before, self._others = self._others, []
        self._checkpoint = self._thread.submit(self._write, copied, step, unfinished, dict(state), before)

    def in_background(self, write: Callable[..., object], *args: Any) -> None:
        """Run a function that writes something else; the next checkpoint gets its name after it.

        So a resumed run never lacks what a step before its checkpoint has written.
        """
        self._others.append(self._thread.submit(write, *args))

    def wait(self) -> None:
        """Until nothing is being written any more.

        Raises:
            SavingError: if it could not be written.
        """
        others, self._others = self._others, []
        self._wait_for([self._checkpoint, *others])

    def _wait_for(self, futures: Sequence[Future[Any] | None]) -> None:
        self._checkpoint = None
        try:
            for future in futures:
                if future is not None:
                    future.result()
        except Exception as error:
            last = latest_in(self.folder)
            whole = f"the last whole checkpoint is {last.folder}" if last else "there is no checkpoint before it"
            raise SavingError(f"a checkpoint could not be written ({error}); {whole}") from error

    def _copied(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copies in host memory; from a GPU into pinned memory, with one wait for all."""
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            # Kept for the run: it reuses its pinned memory, which is slow to allocate.
            self._stager = DefaultStager(StagingOptions(use_shared_memory=False, use_async_staging=False))
        copied: Any = self._stager.stage(tensors | scalars_on_cpu(tensors))
        return copied

    def _write(
        self, tensors: dict[str, Any], step: int, unfinished: Path, state: dict[str, Any],
        before: Sequence[Future[object]],
    ) -> None:  # fmt: skip
        """In the thread: this rank's file; then, when all ranks have written their files, the folder gets its name."""
        failure = None
        try:
            for other in before:
                other.result()
            write_shards(tensors, unfinished / f"shard-{self._rank + 1:05d}.safetensors")
        except Exception as error:
            failure = f"rank {self._rank}: {error}" if self._size > 1 else str(error)
        failures = [failure] * self._size
        if self._group is not None:
            torch.distributed.all_gather_object(failures, failure, group=self._group)
        try:
            if first := next(filter(None, failures), None):
                raise OSError(first)
            if self._rank == 0:
                self._name(step, unfinished, {"step": step, **state})
        except Exception:
            # Room for whatever comes next; earlier checkpoints stay.
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

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


def write_shards(tensors: Mapping[str, Any], path: Path) -> None:
    """Write the shards that this rank holds, as PyTorch's HuggingFaceStorageWriter does.

    That class collects a file's bytes in memory and holds the interpreter's lock while it does, which would stop
    training for seconds.

    Raises:
        ValueError: if this rank holds two shards of one tensor, for which a file has no room.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=False)
    shards: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for item in planner.create_local_plan().items:
        name, shard, placed = item.index.fqn, planner.resolve_data(item), item.tensor_data
        assert isinstance(shard, Tensor)
        assert placed is not None
        if name in shards:
            raise ValueError(f"one rank holds two shards of {name!r}; shard it so that each holds one at most")
        shards[name], offsets[name] = shard, {"saved_offsets": list(placed.chunk.offsets)}
    if shards:
        specs = {name: TensorSpec(tuple(shard.shape), shard.dtype) for name, shard in shards.items()}
        write_tensors(path, specs, shards.items(), metadata={SHARD_OFFSETS: json.dumps(offsets)})


def tensors_of_rank(tensors: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """What one of ``size`` ranks saves, so that each number is saved once.

    Its shards, if it is in the first of several replicas; and of unsharded tensors, which every rank holds, about as
    many bytes as each other rank.
    """
    left_out = {name for name, tensor in tensors.items() if is_sharded(tensor) and not _in_first_replica(tensor)}
    unsharded = [name for name, tensor in tensors.items() if not is_sharded(tensor)]
    bytes_of_rank = [0] * size
    for name in sorted(unsharded, key=lambda name: (-tensors[name].nbytes, name)):
        emptiest = bytes_of_rank.index(min(bytes_of_rank))
        # A tensor costs a little however small it is.
        bytes_of_rank[emptiest] += tensors[name].nbytes + 1
        if emptiest != rank:
            left_out.add(name)
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def _in_first_replica(tensor: Any) -> bool:
    coordinate = tensor.device_mesh.get_coordinate()
    return all(at == 0 for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate())


def scalars_on_cpu(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The one-number tensors on a GPU, such as AdamW's steps: PyTorch does not pin them and would wait for each."""
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_cuda and tensor.numel() == 1 and not is_sharded(tensor):
            by_dtype.setdefault(tensor.dtype, {})[name] = tensor.detach()
    copies: dict[str, Tensor] = {}
    for scalars in by_dtype.values():
        stacked = torch.stack([scalar.flatten() for scalar in scalars.values()]).cpu()
        copies |= {name: copy.view(scalars[name].shape) for name, copy in zip(scalars, stacked, strict=True)}
    return copies
