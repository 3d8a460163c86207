"""Batches with coupled noise: a function of the position, whatever the processes, stops and batches before."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from shortcutflow.coupling import TransportCoupling, couple
from shortcutflow.data.coupled import CoupledStream
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.seeds import draw_noise_rows, generator_for
from shortcutflow.types import Batch, BatchSlice

SHAPE, CLASSES = (1, 2, 2), 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 small images, so that a pool of more samples holds some twice."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    images = random.integers(0, 256, (53, *SHAPE), dtype=np.uint8)
    samples = (Sample(image, i % CLASSES, f"n{i:03d}") for i, image in enumerate(images))
    write_shards(samples, folder, samples_per_shard=10, num_classes=CLASSES, preprocessing="none")
    return folder


def stream(shards: Path, batch_size: int, pool: int, seed: int = 1, **options: Any) -> CoupledStream:
    data = ShardsData(folder=shards, horizontal_flip=True)
    return CoupledStream(data, TransportCoupling(pool=pool), batch_size=batch_size, seed=seed, **options)


def noise_of(batch: Batch) -> torch.Tensor:
    assert batch.noise is not None
    return batch.noise


def assert_same(a: Batch, b: Batch, rows: slice = slice(None)) -> None:
    """b is the rows of a."""
    assert a.keys[rows] == b.keys
    for mine, other in ((a.data, b.data), (a.y, b.y), (noise_of(a), noise_of(b))):
        assert torch.equal(mine[rows], other)


@pytest.mark.parametrize("processes", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("batch_size", "pool"), [(192, 150), (24, 60)])
def test_processes_share_the_batches_of_one(shards: Path, batch_size: int, pool: int, processes: int) -> None:
    """Also where they do not hold whole blocks: there are two of 96 rows, and one of 24."""
    whole = list(islice(stream(shards, batch_size, pool), 5))
    for rank in {0, 1, processes - 1}:
        share = BatchSlice(rank, processes)
        part = stream(shards, batch_size, pool, rank=rank, world_size=processes)
        for batch, mine in zip(whole, part, strict=False):
            assert_same(batch, mine, share.rows)


@pytest.mark.parametrize(("processes", "reads"), [(2, (1, 2)), (3, (0, 1)), (4, (1, 4)), (8, (1, 4))])
def test_processes_that_hold_whole_blocks_read_their_own_rows(
    shards: Path, processes: int, reads: tuple[int, int]
) -> None:
    """A batch of 264 rows has 4 blocks."""
    with (
        mock.patch.object(ShardsData, "open_stream", side_effect=InterruptedError) as opened,
        pytest.raises(InterruptedError),
    ):
        stream(shards, 264, 100, rank=processes - 3 if processes > 4 else 1, world_size=processes)
    assert (opened.call_args.kwargs["rank"], opened.call_args.kwargs["world_size"]) == reads


def test_the_noise_of_a_pool_is_assigned_as_a_whole(shards: Path) -> None:
    """Two blocks of 64 rows, in pools of 3 batches: the draws of each, permuted among its samples."""
    batches = list(islice(stream(shards, 128, 192), 6))
    plain = ShardsData(folder=shards, horizontal_flip=True).open_stream(batch_size=128, seed=1)
    for batch in batches:
        expected = next(plain)
        assert batch.keys == expected.keys
        assert torch.equal(batch.data, expected.data)
    for pool in (0, 3):
        for block in (0, 1):
            rows, three = slice(block, None, 2), range(pool, pool + 3)
            drawn = [draw_noise_rows(128, SHAPE, generator_for(1, "coupling", step=128 * i))[rows] for i in three]
            data, y = (torch.cat([getattr(batches[i], name)[rows] for i in three]) for name in ("data", "y"))
            assigned = torch.cat([noise_of(batches[i])[rows] for i in three])
            assert torch.equal(assigned, couple(torch.cat(drawn), data, y))
            assert not torch.equal(assigned, torch.cat(drawn))


def test_seed_and_position_decide(shards: Path) -> None:
    first, other = next(stream(shards, 24, 60)), next(stream(shards, 24, 60, seed=2))
    assert set(first.keys) != set(other.keys)
    assert not noise_of(first).sort().values.equal(noise_of(other).sort().values)
    every = torch.cat([noise_of(batch) for batch in islice(stream(shards, 24, 60), 6)])
    assert len(every.unique()) == every.numel(), "no number is drawn twice"


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 5, 6])
def test_resume_inside_a_pool(shards: Path, stop_after: int, cached: bool) -> None:
    data = ShardsData(folder=shards, workers=0, cache_bytes=2**20 if cached else 0)

    def begin() -> CoupledStream:
        return CoupledStream(data, TransportCoupling(pool=24), batch_size=8, seed=1)

    whole = list(islice(begin(), 10))
    stopped = begin()
    for _ in islice(stopped, stop_after):
        pass
    assert stopped.state_dict() == {"samples_seen": 8 * stop_after}, "what was handed out, not what was made ahead"
    resumed = begin()
    next(resumed)
    resumed.load_state_dict(stopped.state_dict())
    for number in range(stop_after, 10):
        assert_same(whole[number], resumed.batch_at(8 * number))
        assert_same(whole[number], next(resumed))
        assert_same(whole[9 - number], resumed.batch_at(8 * (9 - number)))


def test_a_position_between_batches(shards: Path) -> None:
    """Where a run goes on with batches of another size."""
    a, b = stream(shards, 8, 24), stream(shards, 8, 24)
    a.load_state_dict({"samples_seen": 20})
    following = list(islice(a, 5))
    b.load_state_dict({"samples_seen": 36})
    assert_same(following[2], next(b))
    assert_same(following[4], b.batch_at(52))


def test_a_pool_is_made_while_the_one_before_is_trained_on(shards: Path) -> None:
    made, threads = threading.Semaphore(0), set()

    class Watched(TransportCoupling):
        def couple(self, *pool: Any) -> torch.Tensor:
            threads.add(threading.current_thread().name)
            made.release()
            return super().couple(*pool)

    next(CoupledStream(ShardsData(folder=shards), Watched(pool=60), batch_size=24, seed=1))
    assert made.acquire(timeout=30)
    assert made.acquire(timeout=30), "the second pool, when one batch of the first was taken"
    assert all(name.startswith("prefetch") for name in threads)


def test_an_error_of_the_thread_is_raised_at_its_pool(shards: Path) -> None:
    """And the same batch is the next one again."""
    pools = []

    class FailsOnce(TransportCoupling):
        def couple(self, *pool: Any) -> torch.Tensor:
            pools.append(pool)
            if len(pools) == 2:
                raise MemoryError("a defect")
            return super().couple(*pool)

    batches = CoupledStream(ShardsData(folder=shards, horizontal_flip=True), FailsOnce(pool=60), batch_size=24, seed=1)
    whole = stream(shards, 24, 60)
    for _ in range(3):
        assert_same(next(whole), next(batches))
    with pytest.raises(MemoryError, match="a defect"):
        next(batches)
    assert batches.state_dict() == {"samples_seen": 72}
    assert_same(next(whole), next(batches))
