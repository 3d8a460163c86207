"""Batches from a folder of shards, in an order that depends on (seed, epoch) alone.

The position is one number, the samples handed out so far: epoch and place within it follow from the manifest. Batches
run on over the end of an epoch, so each sample is seen exactly once an epoch and all batches have the same size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.data.shards import Sample, decode, read_shard
from shortcutflow.seeds import seed_for
from shortcutflow.types import Batch

Item = TypeVar("Item")


class BatchStream(Protocol):
    """What training needs of a data loader: batches without end, and a position that JSON can hold."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there."""


def shuffled(items: Iterable[Item], buffer_size: int, rng: random.Random) -> Iterator[Item]:
    """Shuffle a stream through a buffer: each item leaves when a later one takes its random place."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = rng.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer


class ShardStream:
    """Batches from a folder of shards: images in [-1, 1], other data as it was stored.

    Args:
        folder: holds shards and ``manifest.json``.
        batch_size: samples a batch.
        seed: of the order of shards and samples.
        shuffle_buffer: samples shuffled among each other within the shuffled order of shards.
        cache_bytes: a data set whose pixels fit in is decoded once and kept in memory; the order is the same.
        device: where batches are put.

    Raises:
        FileNotFoundError, ValueError: if the folder is not complete (see :meth:`Manifest.read`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int,
        seed: int,
        shuffle_buffer: int = 4096,
        cache_bytes: int = 256 * 2**20,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.batch_size, self.seed, self.device = folder, batch_size, seed, device
        self.manifest = Manifest.read(folder)
        self.shuffle_buffer = shuffle_buffer
        self._cache: dict[str, list[Sample]] | None = {} if self._bytes() <= cache_bytes else None
        self._samples_seen = 0
        self._samples = self._endless(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        samples = list(islice(self._samples, self.batch_size))
        self._samples_seen += len(samples)
        data = torch.from_numpy(np.stack([sample.data for sample in samples])).to(self.device)
        if self.manifest.values == "uint8":
            # Bytes travel to the device, floats are made there.
            data = data.float() / 127.5 - 1
        y = None
        if self.manifest.num_classes is not None:
            y = torch.tensor([sample.y for sample in samples], device=self.device)
        elif self.manifest.condition_shape is not None:
            y = torch.from_numpy(np.stack([np.asarray(sample.y) for sample in samples])).to(self.device)
        return Batch(data, y, tuple(sample.key for sample in samples))

    def state_dict(self) -> dict[str, int]:
        """The position: samples handed out so far."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the next batch is the one that would have come."""
        self._samples_seen = state["samples_seen"]
        self._samples = self._endless(self._samples_seen)

    def _bytes(self) -> int:
        """Of all decoded samples."""
        values = math.prod(self.manifest.shape) * (1 if self.manifest.values == "uint8" else 4)
        return self.manifest.samples * (values + 4 * math.prod(self.manifest.condition_shape or (0,)))

    def _endless(self, position: int) -> Iterator[Sample]:
        epoch, place = divmod(position, self.manifest.samples)
        while True:
            yield from self._epoch(epoch, place)
            epoch, place = epoch + 1, 0

    def _epoch(self, epoch: int, place: int) -> Iterator[Sample]:
        shards = list(self.manifest.shards)
        random.Random(seed_for(self.seed, "shards", step=epoch)).shuffle(shards)
        order = random.Random(seed_for(self.seed, "samples", step=epoch))
        items = (item for shard in shards for item in self._items(shard))
        for item in islice(shuffled(items, self.shuffle_buffer, order), place, None):
            yield item if isinstance(item, Sample) else decode(item, self.manifest)

    def _items(self, shard: ShardEntry) -> Iterable[Sample | dict[str, Any]]:
        if self._cache is None:
            return read_shard(self.folder / shard.name, shard)
        if shard.name not in self._cache:
            raw = read_shard(self.folder / shard.name, shard)
            self._cache[shard.name] = [decode(members, self.manifest) for members in raw]
        return self._cache[shard.name]
