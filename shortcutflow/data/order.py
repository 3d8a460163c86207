"""The order of samples in an epoch: a function of (seed, epoch) alone, computed where it is needed.

The shards are shuffled and cut into blocks of several; then the samples of each block are shuffled. So a place in an
epoch leads to its sample without reading anything before it: that is what makes a resume exact and fast, and what lets
any number of processes take their slices of the same order. Which shards form a block is drawn anew each epoch, so
batches mix other samples in each epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from shortcutflow.seeds import seed_for

SHARDS_TOGETHER = 8
"""In a block at most; more mix better, and a remote folder's must all be fetched before the first batch."""


class Block(NamedTuple):
    """Shards whose samples are shuffled among each other.

    Attributes:
        start: the block's first place in the epoch.
        shards: indexes of its shards.
        samples: (n, 2) int64, the index of the shard, and in it, of each sample, in order.
    """

    start: int
    shards: np.ndarray
    samples: np.ndarray


class EpochOrder:
    """The order of the samples of several shards.

    Args:
        sizes: samples in each shard.
        seed: of the order.
        shuffle_buffer: a block has as few whole shards as hold so many samples; below the size of a shard it is one
            shard, and the same samples stay together. None: blocks of 4 to 8 shards, as equal as can be, or all if
            there are fewer.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, shuffle_buffer: int | None = None) -> None:
        self._sizes, self._seed, self._buffer = np.array(sizes, dtype=np.int64), seed, shuffle_buffer
        self.samples = int(self._sizes.sum())
        self._epochs: dict[int, tuple[np.ndarray, list[tuple[int, int, int]]]] = {}
        self._blocks: dict[tuple[int, int], Block] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions (b,), counted from the start of training.

        Positions of one batch lie close together, so hardly ever in more than two blocks.

        Returns:
            Epochs (b,), and (b, 2) the indexes of the shards and of the samples in them.
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
        number = bisect_right(bounds, place, key=lambda bound: bound[0]) - 1
        key = (epoch, number)
        if key not in self._blocks:
            start, begin, end = bounds[number]
            _keep(self._blocks, key, self._shuffled_block(epoch, number, start, shards[begin:end]), most=4)
        return self._blocks[key]

    def block_after(self, epoch: int, block: Block) -> Block:
        """The next block, perhaps of the next epoch."""
        end = block.start + len(block.samples)
        return self.block_at(epoch, end) if end < self.samples else self.block_at(epoch + 1, 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """The shards' order in an epoch, and the first place, first and last shard of each block."""
        if epoch not in self._epochs:
            shards = np.random.default_rng(seed_for(self._seed, "shards", step=epoch)).permutation(len(self._sizes))
            places = np.cumsum([0, *self._sizes[shards]]).tolist()
            ends = self._ends(places)
            _keep(self._epochs, epoch, (shards, [(places[i], i, j) for i, j in pairwise([0, *ends])]), most=2)
        return self._epochs[epoch]

    def _ends(self, places: list[int]) -> list[int]:
        """How many of an epoch's shards come up to the end of each block."""
        count = len(places) - 1
        if self._buffer is None:
            blocks = math.ceil(count / SHARDS_TOGETHER)
            return [count * (block + 1) // blocks for block in range(blocks)]
        ends, start = list[int](), 0
        for end in range(1, count + 1):
            if places[end] - start >= self._buffer or end == count:
                ends.append(end)
                start = places[end]
        return ends

    def _shuffled_block(self, epoch: int, number: int, start: int, shards: np.ndarray) -> Block:
        sizes = self._sizes[shards]
        samples = np.stack([np.repeat(shards, sizes), np.concatenate([np.arange(size) for size in sizes])], axis=1)
        order = np.random.default_rng(seed_for(self._seed, "samples", step=epoch, index=number))
        return Block(start, shards, order.permutation(samples))


def _keep(cache: dict[Any, Any], key: object, value: object, *, most: int) -> None:
    """Add a value; the first of more is forgotten."""
    cache[key] = value
    if len(cache) > most:
        del cache[next(iter(cache))]
