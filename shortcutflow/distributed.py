"""The processes of one job: which one this is, its device and cores, how they find each other, and their groups."""

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

PATIENCE = 30 * 60.0
"""Seconds in which all processes must have come to the rendezvous, as PyTorch gives them."""
NEVER = timedelta(days=7)
"""The timeout of a group whose processes may wait for each other as long as they like."""
LEAVING_S = 30.0
"""Seconds that an aborted group may take to be destroyed."""


class PeerError(RuntimeError):
    """Another process of the job failed; the message is its own."""


class Rank(NamedTuple):
    """Which of the job's processes this one is, and which of its machine's."""

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
                f"device {device} was asked for and this machine has {gpus} GPUs: name another device, or start no "
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
    """The same, shared equally by the job's processes on this machine; at least 1."""
    return max(1, cores() // max(1, _number("LOCAL_WORLD_SIZE", 1)))


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        rank, size: of this process, and how many there are.
        device: its device.
        cpu_group: a gloo group, for checkpoints beside training and for waiting; None where there are no groups.
        groups: all groups besides the default one, which are aborted on an error; add those that you make.
    """

    rank: int
    size: int
    device: torch.device
    cpu_group: ProcessGroup | None = None
    groups: list[ProcessGroup] = field(default_factory=list)

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
        """Return when every process has called this; the host waits, also where the device is a GPU."""
        if self.cpu_group is not None:
            torch.distributed.barrier(self.cpu_group)

    def gather(self, something: Any) -> list[Any]:
        """What each process gives, by rank, in each process. Slow: for rare events."""
        if self.cpu_group is None:
            return [something]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, something)
        return gathered

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if self.cpu_group is None:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, how))
        return values


@contextmanager
def joined(device_name: str, *, always_grouped: bool = False, timeout: timedelta = NEVER) -> Iterator[World]:
    """Join the processes that torchrun started, or stand alone; leave them at the end.

    Args:
        device_name: "auto", "cpu" or "cuda".
        always_grouped: make a group also for one process, which FSDP needs.
        timeout: after which a collective fails.

    Raises:
        ValueError: for "cuda" where there is none.
        PeerError: in place of a collective's error, where another process failed and so broke it.
    """
    rank = Rank.from_environment()
    device = rank.device(device_name)
    if rank.world_size == 1 and not always_grouped:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(rank, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout) as groups:
        cpu_group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        groups.append(cpu_group)
        yield World(rank.number, rank.world_size, device, cpu_group, groups)


@contextmanager
def process_group(rank: Rank, backend: str, timeout: timedelta) -> Iterator[list[ProcessGroup]]:
    """Form the job's default process group; destroyed at the end, aborted on an error with those in the list it gives.

    A destroyed NCCL group first waits for its collectives, which hang where the others never enter them
    (pytorch/pytorch#141510).

    Raises:
        PeerError: in place of a collective's error, where another process failed and so broke it.
    """
    # Loaded here: it takes half a second that a run of one process need not spend.
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store: Any = HashStore() if rank.world_size == 1 else attempt_store(rank.number, rank.world_size)
    dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.world_size, timeout=timeout)
    groups: list[ProcessGroup] = []
    try:
        yield groups
    except BaseException as error:
        first = _first_failure(store, rank, error)
        _abort(groups)
        if first and type(error) in (RuntimeError, dist.DistError, dist.DistBackendError, dist.DistNetworkError):
            raise PeerError(first) from error
        raise
    dist.destroy_process_group()


def _first_failure(store: Store, rank: Rank, error: BaseException) -> str:
    """Leave this process's failure for the others; returns that of another which was there before, if any."""
    if isinstance(error, SystemExit):
        return ""
    mine = f"rank {rank.number} failed: {type(error).__name__}: {error}"
    with suppress(Exception):  # the process that holds the store may be gone
        first = store.compare_set("failed", "", mine).decode()
        return "" if first == mine else first
    return ""


def _abort(groups: list[ProcessGroup]) -> None:
    """Drop the groups without waiting for anyone."""
    import torch.distributed as dist

    def leave() -> None:
        for group in [dist.group.WORLD, *groups]:
            with suppress(Exception):  # not every backend knows how to
                group.abort()  # type: ignore[union-attr]
        with suppress(Exception):
            dist.destroy_process_group()

    # Beside, so that whatever it waits for cannot hold back the error.
    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(LEAVING_S)


def attempt_store(rank: int, size: int) -> Store:
    """A part of torchrun's store that no process has written to before (pytorch/pytorch#135712).

    torchrun keeps one store over all its restarts, with the addresses of the processes it has killed in it; gloo would
    try to connect to those. How often this node was restarted does not tell the attempts apart: each node counts its
    own failures only.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, size))
    return PrefixStore(agreed_name(store, rank, size), store)


def agreed_name(store: Store, rank: int, size: int, patience: float = PATIENCE) -> str:
    """A name that the processes of this attempt, all of which call this, have in common and no earlier one had.

    Each of the others says hello with a name made up for this attempt. The first answers by repeating it and adding
    its own; only a process that gets its own name back knows that the answer is not from an earlier attempt, and
    confirms it.

    Raises:
        TimeoutError: naming the processes that did not come.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + patience
    if rank != 0:
        store.set(f"hello/{rank}", mine)
        while not (answer := _read(store, f"welcome/{rank}")).startswith(mine):
            _wait(until, "rank 0 did not come")
        name = answer.removeprefix(mine)
        store.set(f"thanks/{rank}", name)
        return name
    answered: dict[int, str] = {}
    missing = set(range(1, size))
    while missing:
        for other in list(missing):
            hello = _read(store, f"hello/{other}")
            if hello and answered.get(other) != hello:
                store.set(f"welcome/{other}", hello + mine)
                answered[other] = hello
            if _read(store, f"thanks/{other}") == mine:
                missing.remove(other)
        if missing:
            _wait(until, f"ranks {', '.join(map(str, sorted(missing)))} did not come")
    return mine


def _read(store: Store, key: str) -> str:
    """What is there, without waiting for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(until: float, complaint: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(complaint)
    time.sleep(0.02)
