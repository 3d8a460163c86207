"""Batches with the noise of each sample, chosen by a coupling over pools of batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from shortcutflow import conditions
from shortcutflow.coupling import TransportCoupling, linear_sum_assignment
from shortcutflow.data.source import DataSource
from shortcutflow.data.stream import PositionStream, prefetched
from shortcutflow.seeds import draw_noise_rows, generator_for, noise_blocks
from shortcutflow.types import Batch, BatchSlice


class CoupledStream(PositionStream[list[Batch]]):
    """A rank's batches with their noise; a pool of them is made ahead, in a thread.

    A pool is K batches that follow each other; the first begins at position 0. The noise of a batch is drawn from its
    position, in blocks of rows (:func:`shortcutflow.seeds.draw_noise_rows`), and the rows of one block in the K batches
    are assigned among each other. So a batch and its noise depend on the position alone, however many processes share
    it. A process reads and assigns the blocks that its rows lie in: its own rows, if the number of processes divides
    that of blocks, else up to the whole batch. A batch of 64 w rows has w blocks for w = 1, 2, 4, 8, ...

    Args:
        source: gives the batches.
        coupling: of their noise; its pool, rounded up to whole batches, is K times the rows of a block.
        batch_size, seed, rank, world_size, device: as of :meth:`DataSource.open_stream`.

    Raises:
        ImportError: without scipy.
    """

    def __init__(
        self,
        source: DataSource,
        coupling: TransportCoupling,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(device)
        linear_sum_assignment()  # before anything is read
        blocks = noise_blocks(batch_size)
        common = math.gcd(world_size, blocks)
        # Whole blocks, in host memory, and of them the rows of this rank.
        self._slice, self._blocks = BatchSlice(rank % common, common), blocks // common
        self._mine = BatchSlice(rank // common, world_size // common).rows
        self._stream = source.open_stream(batch_size=batch_size, seed=seed, rank=rank % common, world_size=common)
        self._coupling, self._batch_size, self._seed = coupling, batch_size, seed
        self._batches = math.ceil(coupling.pool / (batch_size // blocks))
        self.samples, self.damaged = self._stream.samples, self._stream.damaged
        self._pool: list[Batch] = []

    def __next__(self) -> Batch:
        number = self._place(self._samples_seen)[1]
        if number == 0 or not self._pool:
            self._pool = self._take()
        self._samples_seen += self._batch_size
        return self._on_device(self._pool[number])

    def batch_at(self, position: int) -> Batch:
        """This rank's rows of the global batch that starts at a position, whose whole pool is made for it."""
        start, number = self._place(position)
        ahead = range(start, start + self._batches * self._batch_size, self._batch_size)
        with self._lock:
            return self._on_device(self._coupled(start, [self._stream.batch_at(each) for each in ahead])[number])

    def _read_ahead(self) -> Iterator[list[Batch]]:
        start = self._place(self._samples_seen)[0]
        self._stream.load_state_dict({"samples_seen": start})
        return prefetched(self._pools(start), self._lock, self._device)

    def _forget(self) -> None:
        super()._forget()
        self._pool = []

    def _place(self, position: int) -> tuple[int, int]:
        """Where the pool of a batch starts, and which of the pool's batches it is."""
        number = position // self._batch_size % self._batches
        return position - number * self._batch_size, number

    def _pools(self, start: int) -> Iterator[list[Batch]]:
        for at in itertools.count(start, self._batches * self._batch_size):
            yield self._coupled(at, [next(self._stream) for _ in range(self._batches)])

    def _coupled(self, start: int, batches: list[Batch]) -> list[Batch]:
        """This rank's rows of the batches of a pool, with their noise."""
        noise = [self._noise(batch, start + i * self._batch_size) for i, batch in enumerate(batches)]
        for block in range(self._blocks):
            rows = slice(block, None, self._blocks)
            assigned = self._coupling.couple(
                torch.cat([drawn[rows] for drawn in noise]),
                torch.cat([batch.data[rows] for batch in batches]),
                conditions.concatenate(*[conditions.select(batch.y, rows) for batch in batches]),
            )
            for drawn, chosen in zip(noise, assigned.chunk(len(batches)), strict=True):
                drawn[rows] = chosen
        return [self._of_this_rank(batch, drawn) for batch, drawn in zip(batches, noise, strict=True)]

    def _noise(self, batch: Batch, position: int) -> torch.Tensor:
        generator = generator_for(self._seed, "coupling", step=position)
        return draw_noise_rows(len(batch.data), batch.data.shape[1:], generator, self._slice, dtype=batch.data.dtype)

    def _of_this_rank(self, batch: Batch, noise: torch.Tensor) -> Batch:
        data, noise = batch.data[self._mine], noise[self._mine]
        if self._device.type == "cuda":
            data, noise = data.pin_memory(), noise.pin_memory()
        return Batch(data, conditions.select(batch.y, self._mine), batch.keys[self._mine], noise)

    def _on_device(self, batch: Batch) -> Batch:
        assert batch.noise is not None
        data, noise = (each.to(self._device, non_blocking=True) for each in (batch.data, batch.noise))
        return Batch(data, conditions.to(batch.y, self._device, non_blocking=True), batch.keys, noise)
