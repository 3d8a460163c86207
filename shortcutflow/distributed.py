"""The ranks of one job: rank, world size, device and cores of this process, rendezvous, and process groups."""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

RENDEZVOUS_TIMEOUT_S = 30 * 60.0
"""Seconds in which all ranks must have come to the rendezvous; PyTorch's own default."""
NEVER = timedelta(days=7)
"""The timeout of a group whose ranks may wait for each other without a limit."""
ABORT_TIMEOUT_S = 30.0
"""Seconds that an aborted group may take to be destroyed."""


class PeerError(RuntimeError):
    """Another rank of the job failed; the message is its error."""


class Rank(NamedTuple):
    """Number of this process in the job, how many there are, and its number on its machine."""

    number: int = 0
    world_size: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Rank:
        """As ``torchrun`` sets it; a single process without it.

        Raises:
            ValueError: if RANK does not lie below WORLD_SIZE, or one is no number.
        """
        number, world_size, local = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
        if not 0 <= number < world_size:
            raise ValueError(f"RANK must lie in 0 ... WORLD_SIZE - 1, got {number} of {world_size}")
        return cls(number, world_size, local)

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0, which alone prints and writes."""
        return self.number == 0

    def device(self, wanted: str | None) -> torch.device:
        """The device to work on: ``wanted``, or for None and "auto" a GPU if there is one. Ranks take one each.

        Raises:
            ValueError: if there is no device of that name, or it is a GPU that this machine does not have.
        """
        name = wanted if wanted not in (None, "auto") else ("cuda" if torch.cuda.is_available() else "cpu")
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise ValueError(f"there is no device {name!r}; known: cpu, cuda, cuda:NUMBER, mps")
        device = torch.device(name)
        if device.type != "cuda":
            return device
        device = torch.device("cuda", self.local if device.index is None else device.index)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index >= gpus:
            raise ValueError(
                f"there is no device {device}, this machine has {gpus} GPUs: name another device, or start no "
                "more processes than there are GPUs"
            )
        return device


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}") from error


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_per_process() -> int:
    """CPU cores for this process, where the job's processes on this machine share them equally; at least 1."""
    return max(1, cores() // max(1, _number("LOCAL_WORLD_SIZE", 1)))


@dataclass(frozen=True)
class World:
    """The ranks that train together.

    Attributes:
        rank, size: of this process, and how many there are.
        device: of this process.
        cpu_group: a gloo group, for checkpoints during training and for barriers; None where there are no groups.
        groups: all groups besides the default one, which are aborted on an error; add new ones here.
    """

    rank: int
    size: int
    device: torch.device
    cpu_group: ProcessGroup | None = None
    groups: list[ProcessGroup] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on each."""
        return self._reduced(values, "SUM")

    def max(self, values: Tensor) -> Tensor:
        """The largest over all ranks, on each, entry by entry."""
        return self._reduced(values, "MAX")

    def wait_for_all(self) -> None:
        """Return when every rank has called this; the host waits, also where the device is a GPU."""
        if self.cpu_group is not None:
            torch.distributed.barrier(self.cpu_group)

    def gather(self, value: Any) -> list[Any]:
        """The argument of every rank, by rank, on each. Slow: for rare events."""
        if self.cpu_group is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def _reduced(self, values: Tensor, op: str) -> Tensor:
        if self.cpu_group is None:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, op))
        return values


@contextmanager
def joined(device_name: str, *, always_grouped: bool = False, timeout: timedelta = NEVER) -> Iterator[World]:
    """Form the process group of the ranks that torchrun started, if there are several.

    It is destroyed at the end, and aborted on an error: a destroyed NCCL group first waits for its collectives, which
    hang where the others never enter them (pytorch/pytorch#141510).

    Args:
        device_name: "auto", "cpu" or "cuda".
        always_grouped: form a group also for one process, which FSDP needs.
        timeout: after which a collective fails.

    Raises:
        ValueError: for "cuda" where there is none.
        PeerError: in place of a collective's error, where another rank failed and so broke it.
    """
    rank = Rank.from_environment()
    device = rank.device(device_name)
    if rank.world_size == 1 and not always_grouped:
        yield World(0, 1, device)
        return
    # Loaded here: it takes half a second that a run of one process need not spend.
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store: Any = HashStore() if rank.world_size == 1 else attempt_store(rank.number, rank.world_size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.world_size, timeout=timeout)
    groups: list[ProcessGroup] = []
    try:
        groups.append(dist.new_group(backend="gloo", timeout=timeout))
        yield World(rank.number, rank.world_size, device, groups[0], groups)
    except BaseException as error:
        first = _first_failure(store, rank, error)
        _abort(groups)
        if first and type(error) in (RuntimeError, dist.DistError, dist.DistBackendError, dist.DistNetworkError):
            raise PeerError(first) from error
        raise
    dist.destroy_process_group()


def _first_failure(store: Store, rank: Rank, error: BaseException) -> str:
    """Report this rank's failure to the others; returns that of another rank which failed before, if any."""
    if isinstance(error, SystemExit):
        return ""
    mine = f"rank {rank.number} failed: {type(error).__name__}: {error}"
    with suppress(Exception):  # the process that holds the store may be gone
        first = store.compare_set("failed", "", mine).decode()
        return "" if first == mine else first
    return ""


def _abort(groups: list[ProcessGroup]) -> None:
    """Drop the groups without waiting for other ranks."""
    import torch.distributed as dist

    def abort() -> None:
        for group in [dist.group.WORLD, *groups]:
            with suppress(Exception):  # not every backend knows how to
                group.abort()  # type: ignore[union-attr]
        with suppress(Exception):
            dist.destroy_process_group()

    # Beside, so that whatever it waits for cannot hold back the error.
    thread = threading.Thread(target=abort, daemon=True)
    thread.start()
    thread.join(ABORT_TIMEOUT_S)


def attempt_store(rank: int, size: int) -> Store:
    """A store of this attempt alone, inside torchrun's (pytorch/pytorch#135712).

    torchrun keeps one store over all its restarts, with the addresses of the processes it has killed in it; gloo would
    try to connect to those. The count of restarts does not tell attempts apart: each node counts its own failures only.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, size))
    return PrefixStore(attempt_name(store, rank, size), store)


def attempt_name(store: Store, rank: int, size: int, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> str:
    """A name that the ranks of this attempt, all of which call this, have in common and no earlier attempt had.

    Every other rank says hello with an id drawn for this attempt, and takes rank 0's name from the answer to that id.
    Rank 0 may first answer the id of an earlier attempt: it goes on until each rank has confirmed its name.

    Raises:
        TimeoutError: naming the ranks that did not come.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank != 0:
        store.set(f"hello/{rank}", mine)
        while not (name := _read(store, f"answer/{rank}/{mine}")):
            _wait(until, "rank 0 did not come")
        store.set(f"confirmed/{rank}/{name}", "yes")
        return name
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if hello := _read(store, f"hello/{other}"):
                store.set(f"answer/{other}/{hello}", mine)
            if _read(store, f"confirmed/{other}/{mine}"):
                missing.remove(other)
        if missing:
            _wait(until, f"ranks {', '.join(map(str, sorted(missing)))} did not come")
    return mine


def _read(store: Store, key: str) -> str:
    """The value of a key, without waiting for it; empty if there is none."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(until: float, message: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(message)
    time.sleep(0.02)
