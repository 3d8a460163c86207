"""Batches from a folder of shards, in an order that depends on (seed, epoch) alone.

The position is one number, the samples that all processes together have received. Batches run on over the end of an
epoch, so every sample is seen exactly once an epoch, all batches have the same size, and nothing is dropped or padded.
Of the global batch, which holds positions p ... p + B - 1, rank r of w gets every w-th from the r-th on. So a run can
go on with another number of processes, or of workers, and see the very same global batches.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from threading import Lock
from types import GeneratorType
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shortcutflow import conditions
from shortcutflow.data.augment import Augmentation
from shortcutflow.data.order import EpochOrder
from shortcutflow.data.shard_folder import DamagedSampleError, ShardFolder, UnreadableShardError
from shortcutflow.data.shards import Sample
from shortcutflow.distributed import cores_per_process
from shortcutflow.types import Batch, BatchSlice

MOST_WORKERS = 8
Item = TypeVar("Item")
logger = logging.getLogger(__name__)


class BatchStream(Protocol):
    """A rank's batches without end, and their position as JSON can hold it: what training needs of a data loader.

    All ranks' batches together are the global batch, whose rows must depend on the position alone; a batch's y may be
    labels, a tensor, a dictionary of tensors or None, with one row a sample.

    Attributes:
        samples: of an epoch.
        damaged: names of samples that could not be read so far.
    """

    samples: int
    damaged: set[str]

    def __next__(self) -> Batch: ...

    def batch_at(self, position: int, /) -> Batch:
        """The batch that starts at a position; the stream stays where it is."""

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts: ``{"samples_seen": position}``."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there."""


def prefetched(items: Iterator[Item], lock: Lock, device: torch.device) -> Iterator[Item]:
    """Items, of which the next is already being made in a thread, while it holds the lock; an error comes in its turn.

    The thread shares the memory of this process, where worker processes would each keep a cache of their own, and ends
    with the iterator. ``device`` is made its current GPU, or pinning memory there would open a context on the first.
    """

    def make() -> Item:
        with lock:
            return next(items)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            pool.submit(torch.cuda.set_device, index)
        coming = pool.submit(make)
        while True:
            item = coming.result()
            coming = pool.submit(make)
            yield item


class PositionStream(ABC, Generic[Item]):
    """What is made ahead from a position, which is the number of samples handed out so far to all ranks together."""

    def __init__(self, device: torch.device | str) -> None:
        self._device, self._samples_seen = torch.device(device), 0
        self._coming: Iterator[Item] | None = None
        self._lock = Lock()  # held by whichever thread uses the files and cache

    @abstractmethod
    def _read_ahead(self) -> Iterator[Item]:
        """Everything from the present position on."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the next batch is the one that would have come."""
        self._samples_seen = state["samples_seen"]
        self._forget()

    def _take(self) -> Item:
        """The next item; after an error it is the next one again."""
        if self._coming is None:
            self._coming = self._read_ahead()
        try:
            return next(self._coming)
        except Exception:
            self._forget()
            raise

    def _forget(self) -> None:
        """Drop what was made ahead, and end the thread that makes it."""
        if isinstance(self._coming, GeneratorType):
            self._coming.close()
        self._coming = None


class HostBatch(NamedTuple):
    """A rank's batch in host memory, and the samples that were found damaged in making it."""

    data: torch.Tensor
    y: Any
    keys: tuple[str, ...]
    damaged: tuple[str, ...]


class ShardStream(PositionStream[HostBatch]):
    """A rank's rows of the global batches from a folder of shards.

    Images come in [-1, 1], latents drawn anew at each visit, other data as it was stored.

    Args:
        folder: holds shards and ``manifest.json``.
        batch_size: samples a global batch, over all ranks.
        seed: of the order, the flips and the latents.
        shuffle_buffer: how many samples are shuffled among each other, by whole shards: those of as few as hold so
            many, or None for those of up to 8 shards. See :class:`~shortcutflow.data.order.EpochOrder`.
        horizontal_flip: mirror each sample or not, drawn from (seed, epoch, sample).
        cache_bytes: a data set whose decoded samples fit in is kept in memory; the batches are the same.
        rank, world_size: this process and how many share the stream.
        workers: processes that read ahead; None: as many as there are cores to spare, none for a cached data set, which
            has a thread that makes one batch ahead.
        on_error: a sample that cannot be read is an error ("raise"), or another takes its place ("skip"): the next one
            in its shard, or in the next shard if none is left. Each is counted and its name logged once.
        device: where batches are put.

    Raises:
        FileNotFoundError, ValueError: if the folder is not complete or does not fit the other arguments.
        DamagedSampleError: at a batch with a sample that cannot be read, if that is an error or none can be read.
        ReadError: at a batch with a shard that cannot be fetched or read, after several tries.
    """

    def __init__(
        self,
        folder: Path | ShardFolder,
        *,
        batch_size: int,
        seed: int,
        shuffle_buffer: int | None = None,
        horizontal_flip: bool = False,
        cache_bytes: int = 256 * 2**20,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        on_error: Literal["skip", "raise"] = "skip",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(device)
        if batch_size % world_size:
            raise ValueError(f"a global batch of {batch_size} cannot be shared equally by {world_size} processes")
        # A copy has files of its own, which no other stream's thread closes.
        shards = copy(folder) if isinstance(folder, ShardFolder) else ShardFolder(folder)
        for message in shards.wrong_sizes():
            if on_error == "raise":
                raise ValueError(message)
            logger.warning(message)
        self.manifest, self.samples = shards.manifest, shards.manifest.samples
        self.damaged: set[str] = set()
        """Of each sample, or shard, that could not be read so far: its name and why."""
        augmentation = Augmentation(self.manifest, seed=seed, horizontal_flip=horizontal_flip)
        sizes = [shard.samples for shard in self.manifest.shards]
        order = EpochOrder(sizes, seed=seed, shuffle_buffer=shuffle_buffer)
        cached = self.manifest.samples * augmentation.bytes_per_sample <= cache_bytes
        # By position; the map-style data set behind the stream, for a DataLoader of one's own.
        batch_slice, skip = BatchSlice(rank, world_size), on_error == "skip"
        self.batches = RankBatches(shards, order, augmentation, batch_size, batch_slice, skip=skip, cached=cached)
        self._batch_size = batch_size
        if workers is None:  # the cores of this process beside the one that trains
            workers = 0 if cached else max(1, min(MOST_WORKERS, cores_per_process() - 1))
        self._cached, self._workers = cached, workers

    def __next__(self) -> Batch:
        batch = self._take()
        self._samples_seen += self._batch_size
        for name in batch.damaged:
            if name not in self.damaged:
                self.damaged.add(name)
                logger.warning("%s; another takes its place (%d so far)", name, len(self.damaged))
        return self._on_device(batch)

    def batch_at(self, position: int) -> Batch:
        """This rank's rows of the global batch that starts at a position; the stream stays where it is."""
        with self._lock:
            return self._on_device(self.batches[position])

    def _on_device(self, batch: HostBatch) -> Batch:
        data = batch.data.to(self._device, non_blocking=True)
        if self.manifest.values == "uint8":
            # Bytes travel to the device, floats are made there.
            data = data.contiguous().float().div_(127.5).sub_(1)
        return Batch(data, conditions.to(batch.y, self._device, non_blocking=True), batch.keys)

    def _read_ahead(self) -> Iterator[HostBatch]:
        loader = DataLoader(
            self.batches,
            sampler=itertools.count(self._samples_seen, self._batch_size),  # where global batches begin
            batch_size=None,
            num_workers=self._workers,
            collate_fn=unchanged,  # it is a batch already
            prefetch_factor=4 if self._workers else None,
            pin_memory=self._device.type == "cuda",
            # Not used for anything; without one the loader would draw from the global generator.
            generator=torch.Generator(),
        )
        threaded = self._cached and not self._workers
        return prefetched(iter(loader), self._lock, self._device) if threaded else iter(loader)


def unchanged(batch: Item) -> Item:
    """What a loader does with a batch that is one already."""
    return batch


class RankBatches(Dataset[HostBatch]):
    """A rank's batch as a function of the position where its global batch starts: what workers compute."""

    def __init__(
        self, shards: ShardFolder, order: EpochOrder, augmentation: Augmentation, batch_size: int,
        batch_slice: BatchSlice, *, skip: bool, cached: bool,
    ) -> None:  # fmt: skip
        self._shards, self._order, self._augmentation, self._skip = shards, order, augmentation, skip
        self._batch_size, self._slice = batch_size, batch_slice
        self._cache: dict[tuple[int, int, int], Sample] | None = {} if cached else None
        self._sizes = [shard.samples for shard in shards.manifest.shards]
        self._first = np.cumsum([0, *self._sizes[:-1]])
        # A shard that was cut off has thousands, each of which would be read again for every one of the others. By
        # copy: whether one is readable must not depend on which was read before.
        self._damaged: dict[tuple[int, int, int], str] = {}

    def __getitem__(self, position: int) -> HostBatch:
        positions = np.arange(position, position + self._batch_size)[self._slice.rows]
        epochs, places = self._order.at(positions)
        if self._shards.is_remote:
            epoch, place = divmod(position, self._order.samples)
            coming = self._order.block_after(epoch, self._order.block_at(epoch, place))
            self._shards.fetch_ahead([self._shards.manifest.shards[i] for i in coming.shards.tolist()])
        draws = self._augmentation.draw(epochs, self._first[places[:, 0]] + places[:, 1])
        damaged: list[str] = []
        wanted = zip(places.tolist(), self._augmentation.copies(draws), strict=True)
        samples = [self._sample((shard, number, copy), damaged) for (shard, number), copy in wanted]
        data = self._augmentation.apply([sample.data for sample in samples], draws)
        keys = tuple(sample.key for sample in samples)
        return HostBatch(data, self._conditions(samples), keys, tuple(damaged))

    def _sample(self, place: tuple[int, int, int], damaged: list[str]) -> Sample:
        if self._cache is None:
            return self._readable(*place, damaged)
        if place not in self._cache:
            self._cache[place] = self._readable(*place, damaged)
        return self._cache[place]

    def _readable(self, shard: int, number: int, copy: int, damaged: list[str]) -> Sample:
        """This sample, or else the first that can be read of those after it in its shard and in the next shards.

        ``damaged`` takes what could not be read and was not known before.
        """
        for step in range(len(self._sizes)):
            now = (shard + step) % len(self._sizes)
            first = number if step == 0 else 0
            for i in range(self._sizes[now]):
                place = now, (first + i) % self._sizes[now], copy
                if place in self._damaged:
                    continue
                try:
                    return self._shards.read(now, place[1], copy=copy)
                except DamagedSampleError as error:
                    if not self._skip:
                        raise
                    damaged.append(str(error))
                    if isinstance(error, UnreadableShardError):
                        break
                    self._damaged[place] = str(error)
        known = [*damaged, *self._damaged.values()]
        raise DamagedSampleError(f"none of the {sum(self._sizes)} samples can be read: {known[0]}")

    def _conditions(self, samples: list[Sample]) -> torch.Tensor | None:
        if self._shards.manifest.condition_shape is not None:
            return torch.from_numpy(np.stack([np.asarray(sample.y) for sample in samples]))
        if self._shards.manifest.num_classes is not None:
            return torch.tensor([sample.y for sample in samples])
        return None
