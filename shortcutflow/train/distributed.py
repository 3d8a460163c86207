"""Processes that train one run together: their groups, and the networks as they call them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shortcutflow.train.meeting import fresh_store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weights autocast rounds to bfloat16 in any case."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank, size: this process and how many there are.
        device: its device.
        saving: the group through which checkpoints are coordinated, beside training; None where there are no groups.
    """

    rank: int
    size: int
    device: torch.device
    saving: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each."""
        return self._reduced(values, "SUM")

    def max(self, values: Tensor) -> Tensor:
        """The largest over all processes, in each, entry by entry."""
        return self._reduced(values, "MAX")

    def wait_for_all(self) -> None:
        """Go on when every process has come here."""
        self.sum(torch.zeros(1, device=self.device))

    def gather(self, something: Any) -> list[Any]:
        """What each process gives, by rank, in each process. Slow: for rare events."""
        if self.saving is None:
            return [something]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, something)
        return gathered

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if self.saving is None:
            return values
        import torch.distributed as dist

        values = values.clone()
        dist.all_reduce(values, getattr(dist.ReduceOp, how))
        return values


@contextmanager
def joined(device_name: str, *, sharded: bool) -> Iterator[World]:
    """Join the processes that torchrun started, or stand alone; leave them at the end.

    Args:
        device_name: "auto", "cpu" or "cuda".
        sharded: FSDP needs a group, also for one process.

    Raises:
        ValueError: for "cuda" where there is none.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = pick_device(device_name)
    if size == 1 and not sharded:
        yield World(0, 1, device)
        return
    # Imported here: it takes half a second that a run of one process need not spend.
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, store=fresh_store(rank, size), rank=rank, world_size=size)
    try:
        yield World(rank, size, device, saving=dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one.

    Raises:
        ValueError: for "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device is 'cuda', but torch finds no GPU here; use 'cpu' or 'auto'")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def shard(network: nn.Module, world: World, *, shard_group: int | None, bfloat16: bool) -> None:
    """Shard a network in place with FSDP2: each unit of its ``shard_plan`` by itself, the rest together.

    Units travel in bfloat16 if all their weights belong to layers that autocast would round anyway, so the numbers are
    those of an unsharded run.

    Args:
        network: not compiled yet, or compiled block by block.
        world: its processes.
        shard_group: processes that hold one copy together; None: all.
        bfloat16: whether training runs under autocast.

    Raises:
        ValueError: if shard_group does not divide the number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    group = shard_group or world.size
    if world.size % group:
        raise ValueError(f"training.shard_group is {group}: it must divide the {world.size} processes")
    if group == world.size:
        mesh = init_device_mesh(world.device.type, (group,))
    else:
        mesh = init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=("replicas", "shards"))
    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    units: list[nn.Module] = network.shard_plan() if hasattr(network, "shard_plan") else []  # type: ignore[operator]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=rounded if bfloat16 and _rounded_by_autocast(unit) else exact)
    # The average is called without a backward pass: were its outermost weights kept after a call, the next one would
    # not see that they have been updated.
    fully_shard(network, mesh=mesh, mp_policy=exact, reshard_after_forward=True)


def _rounded_by_autocast(unit: nn.Module) -> bool:
    owners = (module for module in unit.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(isinstance(module, AUTOCAST_LAYERS) for module in owners)


def summed_over_shards(world: World, *, sharded: bool, shard_group: int | None) -> Callable[[Tensor], Tensor]:
    """What adds sums over this process's weights up to sums over all weights, each counted once."""
    if not sharded:
        return lambda values: values
    copies = world.size // (shard_group or world.size)
    return lambda values: world.sum(values) / copies


def replicate(network: nn.Module, world: World) -> nn.Module:
    """The network in DistributedDataParallel, which adds up the gradients of all processes during the backward pass."""
    from torch.nn.parallel import DistributedDataParallel

    ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer versions have another name for broadcast_buffers, which older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
