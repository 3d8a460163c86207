"""The order of samples in an epoch: a function of (seed, epoch) alone, computed where it is needed.

The shards are shuffled; then runs of them that together hold a buffer's worth of samples are each shuffled through. So
a place in an epoch leads to its sample without reading anything before it: that is what makes a resume exact and fast,
and what lets any number of processes take their shares of the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from shortcutflow.seeds import seed_for

Key = TypeVar("Key")
Value = TypeVar("Value")


class Block(NamedTuple):
    """Shards whose samples are shuffled among each other.

    Attributes:
        start: the block's first place in the epoch.
        shards: numbers of its shards.
        samples: (n, 2) int64, the shard and the number within it of each sample, in order.
    """

    start: int
    shards: np.ndarray
    samples: np.ndarray


class EpochOrder:
    """The order of the samples of several shards.

    Args:
        sizes: samples in each shard.
        seed: of the order.
        shuffle_buffer: shards are taken together until they hold at least so many samples.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, shuffle_buffer: int) -> None:
        self._sizes, self._seed, self._buffer = np.array(sizes, dtype=np.int64), seed, shuffle_buffer
        self.samples = int(self._sizes.sum())
        self._epochs: OrderedDict[int, tuple[np.ndarray, list[tuple[int, int, int]]]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions (b,), counted from the start of training: epochs (b,), and (b, 2) shard and number.

        Positions of one batch lie close together, so hardly ever in more than two blocks.
        """
        epochs, places = np.divmod(positions, self.samples)
        found = np.empty((len(positions), 2), dtype=np.int64)
        missing = np.ones(len(positions), dtype=bool)
        while missing.any():
            first = int(missing.argmax())
            epoch = int(epochs[first])
            block = self.block_at(epoch, int(places[first]))
            inside = (epochs == epoch) & (places >= block.start) & (places < block.start + len(block.samples))
            found[inside] = block.samples[places[inside] - block.start]
            missing &= ~inside
        return epochs, found

    def block_at(self, epoch: int, place: int) -> Block:
        """The block that holds a place of an epoch."""
        shards, bounds = self._epoch(epoch)
        starts = [start for start, _, _ in bounds]
        number = int(np.searchsorted(starts, place, side="right")) - 1
        key = (epoch, number)
        if key not in self._blocks:
            start, begin, end = bounds[number]
            self._blocks[key] = self._shuffled_block(epoch, number, start, shards[begin:end])
        return _kept(self._blocks, key, most=4)

    def block_after(self, epoch: int, block: Block) -> Block:
        """The next block, perhaps of the next epoch."""
        end = block.start + len(block.samples)
        return self.block_at(epoch, end) if end < self.samples else self.block_at(epoch + 1, 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """The shards' order in an epoch, and the first place, first and last shard of each block."""
        if epoch not in self._epochs:
            shards = np.random.default_rng(seed_for(self._seed, "shards", step=epoch)).permutation(len(self._sizes))
            bounds, begin, start, held = [], 0, 0, 0
            for i, size in enumerate(self._sizes[shards].tolist()):
                held += size
                if held >= self._buffer or i == len(shards) - 1:
                    bounds.append((start, begin, i + 1))
                    begin, start, held = i + 1, start + held, 0
            self._epochs[epoch] = shards, bounds
        return _kept(self._epochs, epoch, most=2)

    def _shuffled_block(self, epoch: int, number: int, start: int, shards: np.ndarray) -> Block:
        sizes = self._sizes[shards]
        samples = np.stack([np.repeat(shards, sizes), np.concatenate([np.arange(size) for size in sizes])], axis=1)
        order = np.random.default_rng(seed_for(self._seed, "samples", step=epoch, index=number))
        return Block(start, shards, order.permutation(samples))


def _kept(cache: OrderedDict[Key, Value], key: Key, *, most: int) -> Value:
    """The value of a key, which becomes the last to be forgotten."""
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)
    return cache[key]
