"""Prefetching one item of an iterator in a thread, where worker processes would each keep a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """An iterator whose next item is already being made; what that raises is raised by the ``next`` that takes it.

    The thread ends with this object too.

    Args:
        items: used in the thread alone.
        device: a GPU that is made the thread's current one, or pinning memory there would open a context on the first.
    """

    def __init__(self, items: Iterator[Item], device: torch.device) -> None:
        self._items, self._pool = items, ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._pool.submit(torch.cuda.set_device, index)
        self._coming = self._pool.submit(next, items)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item = self._coming.result()
        self._coming = self._pool.submit(next, self._items)
        return item

    def close(self) -> None:
        """End the thread, after the item that it is at."""
        self._pool.shutdown(cancel_futures=True)

    def settle(self) -> None:
        """Wait until the thread is idle; it stays so until the next item is taken."""
        wait([self._coming])
