"""Processes that evaluate together: they share files, and wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from shortcutflow.distributed import NEVER, Rank, process_group


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
    # On the CPU only: nothing but the waiting goes through it. A part may take hours longer on one device than on
    # another; if a process dies, its launcher ends the others.
    with process_group(rank, "gloo", NEVER):
        yield Team(rank, torch.distributed.barrier)
