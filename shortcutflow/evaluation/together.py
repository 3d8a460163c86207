"""Processes that evaluate together: they share files, and wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from shortcutflow.data.ranks import Rank
from shortcutflow.train.meeting import fresh_store

PATIENCE = timedelta(days=7)
"""A part may take hours longer on one device than on another. If a process dies, its launcher ends the others."""


class Team(NamedTuple):
    """The processes that evaluate together, seen from one of them.

    Attributes:
        rank: which of them this is.
        wait: returns once all of them have called it.
    """

    rank: Rank = Rank()
    wait: Callable[[], None] = lambda: None

    @property
    def leads(self) -> bool:
        """Whether this process puts together what all have made, and speaks for all."""
        return self.rank.number == 0


ALONE = Team()
"""One process."""


@contextmanager
def meeting(rank: Rank) -> Iterator[Team]:
    """Join the processes that torchrun started, or stand alone; leave them at the end."""
    if rank.world_size == 1:
        yield Team(rank)
        return
    # Imported here: it takes half a second that one process need not spend.
    import torch.distributed as dist

    # On the CPU only: nothing but the waiting goes through it.
    store = fresh_store(rank.number, rank.world_size)
    dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.world_size, timeout=PATIENCE)

    def wait() -> None:
        dist.barrier()

    try:
        yield Team(rank, wait)
    finally:
        dist.destroy_process_group()
