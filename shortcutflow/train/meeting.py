"""Where the processes that torchrun started find each other, also when it has started them again."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

PATIENCE = 30 * 60.0
"""Seconds in which all processes must have come, as PyTorch gives them."""


def fresh_store(rank: int, size: int) -> Store:
    """A part of torchrun's store that no process has written to before.

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
    its own; only who hears the own name back knows that the answer is not from an earlier attempt, and confirms it.

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
