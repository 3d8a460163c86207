"""Shards and the stream over them: every sample once an epoch, an order of its own, exact resume."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.digits import paper_recipe as recipe
from shortcutflow.data.digits import DigitsData, load_digits, write_digits
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.data.stream import HostBatch, RankBatches, ShardStream
from shortcutflow.io.atomic import build_once
from shortcutflow.smoke import smoke as training_smoke
from shortcutflow.train.loop import train


def write_numbers(folder: Path, count: int = 53, samples_per_shard: int = 10) -> Manifest:
    """Tiny images whose pixels say which sample they are."""
    samples = (Sample(np.full((1, 2, 2), i, np.uint8), i % 3, f"n{i:03d}") for i in range(count))
    return write_shards(samples, folder, samples_per_shard=samples_per_shard, num_classes=3, preprocessing="none")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def keys(stream: ShardStream, batches: int) -> list[str]:
    return [key for batch in islice(stream, batches) for key in batch.keys]


def test_digits_come_back(digits: Path) -> None:
    """All 1,797 images and labels, within the half grey level that 8 bits leave."""
    images, labels = load_digits()
    stream = ShardStream(digits, batch_size=1797, seed=0)
    batch = next(stream)
    assert stream.manifest.samples == 1797
    assert Manifest.read(digits).shape == DigitsData().describe().shape == (1, 8, 8)
    index = torch.tensor([int(key.removeprefix("digit")) for key in batch.keys])
    assert batch.y is not None
    assert torch.equal(batch.y, torch.from_numpy(labels)[index])
    assert (batch.data - torch.from_numpy(images)[index]).abs().max() <= 0.5 / 127.5 + 1e-6
    assert batch.data.dtype == torch.float32


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("batch_size", [1, 7, 53, 60])
def test_each_sample_once_an_epoch(tmp_path: Path, batch_size: int, cache_bytes: int) -> None:
    write_numbers(tmp_path)
    stream = ShardStream(tmp_path, batch_size=batch_size, seed=0, shuffle_buffer=16, cache_bytes=cache_bytes)
    seen = keys(stream, 53 * 3 // batch_size)
    for epoch in range(len(seen) // 53):
        assert max(Counter(seen[epoch * 53 : (epoch + 1) * 53]).values()) == 1
    sizes = {len(batch.data) for batch in islice(stream, 5)}
    assert sizes == {batch_size}, "all batches have the same size, over the end of an epoch too"


def test_order_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    write_numbers(tmp_path)

    def order(seed: int) -> list[str]:
        return keys(ShardStream(tmp_path, batch_size=53, seed=seed), 2)

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    assert first[:53] != first[53:]
    assert first[:53] != sorted(first[:53])


def test_cached_and_streamed_order_are_the_same(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    cached = ShardStream(tmp_path, batch_size=8, seed=3, shuffle_buffer=9, cache_bytes=2**20)
    streamed = ShardStream(tmp_path, batch_size=8, seed=3, shuffle_buffer=9, cache_bytes=0)
    for a, b in islice(zip(cached, streamed, strict=True), 20):
        assert a.keys == b.keys
        assert torch.equal(a.data, b.data)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("stop_after", [0, 1, 6, 7, 13, 20])
def test_resume_gives_the_next_batch(tmp_path: Path, stop_after: int, cache_bytes: int) -> None:
    write_numbers(tmp_path)
    options = {"batch_size": 8, "seed": 3, "shuffle_buffer": 9, "cache_bytes": cache_bytes}
    stream = ShardStream(tmp_path, **options)  # type: ignore[arg-type]
    for _ in range(stop_after):
        next(stream)
    resumed = ShardStream(tmp_path, **options)  # type: ignore[arg-type]
    resumed.load_state_dict(stream.state_dict())
    for _ in range(8):
        expected, got = next(stream), next(resumed)
        assert got.keys == expected.keys
        assert torch.equal(got.data, expected.data)


@pytest.mark.parametrize("stop_after", [0, 5])
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(tmp_path: Path, workers: int, stop_after: int) -> None:
    """The same batches, flips and labels; nothing that was read ahead is lost at a stop."""
    write_numbers(tmp_path)
    here = ShardStream(tmp_path, batch_size=8, seed=3, shuffle_buffer=9, horizontal_flip=True, workers=0)
    for _ in islice(here, stop_after):
        pass
    there = ShardStream(
        tmp_path, batch_size=8, seed=3, shuffle_buffer=9, horizontal_flip=True, workers=workers, cache_bytes=0
    )
    there.load_state_dict(here.state_dict())
    for a, b in islice(zip(here, there, strict=True), 9):
        assert (a.keys, here.state_dict()) == (b.keys, there.state_dict())
        assert torch.equal(a.data, b.data)
        assert a.y is not None
        assert b.y is not None
        assert torch.equal(a.y, b.y)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(tmp_path: Path, workers: int) -> None:
    write_numbers(tmp_path)
    before = torch.get_rng_state()
    next(ShardStream(tmp_path, batch_size=8, seed=3, horizontal_flip=True, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_rewraps_a_batch(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    batch = next(ShardStream(tmp_path, batch_size=8, seed=0))
    assert isinstance(batch.keys, tuple)
    assert (batch.data.dtype, batch.data.shape) == (torch.float32, (8, 1, 2, 2))
    assert batch.y is not None
    assert (batch.y.dtype, batch.y.shape) == (torch.int64, (8,))


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    with pytest.raises(ValueError, match="a global batch of 8 cannot be shared equally by 3 processes"):
        ShardStream(tmp_path, batch_size=8, seed=0, rank=0, world_size=3)


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write_numbers(tmp_path / "a"), write_numbers(tmp_path / "b")
    assert first == second
    assert [s.samples for s in first.shards] == [10, 10, 10, 10, 10, 3]


def test_prepare_writes_once(tmp_path: Path) -> None:
    data = DigitsData(folder=tmp_path / "digits")
    manifest = data.prepare() / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert data.prepare() == tmp_path / "digits"
    assert manifest.stat().st_mtime_ns == written
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def test_several_processes_may_prepare_at_once(tmp_path: Path) -> None:
    """Who comes second finds the first one's folder complete, and leaves it and nothing of its own."""
    folder = tmp_path / "digits"

    def while_another_finishes(unfinished: Path) -> None:
        write_numbers(unfinished)
        write_numbers(folder)

    assert build_once(folder, while_another_finishes, marker="manifest.json") == folder
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert build_once(folder, lambda _: pytest.fail("it is there already"), marker="manifest.json") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ZeroDivisionError):
        build_once(tmp_path / "other", lambda new: 1 / len(list(new.iterdir())), marker="manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"], "nothing half made is left"


def test_a_data_set_is_opened_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run with grids reads its manifest once; another one in its place is noticed."""
    write_digits(tmp_path / "shards")
    reads: list[str] = []
    parse = Manifest.parse.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Manifest], content: bytes, where: str) -> Manifest:
        reads.append(where)
        return parse(cls, content, where)  # type: ignore[no-any-return]

    monkeypatch.setattr(Manifest, "parse", classmethod(counted))
    data = ShardsData(folder=tmp_path / "shards")
    smoke = training_smoke(recipe())
    settings = smoke.training.model_copy(update={"steps": 4, "grid_every": 1, "grid_steps": (1,)})
    train(smoke.model_copy(update={"data": data, "evaluation": None, "training": settings}), tmp_path / "run")
    assert list((tmp_path / "run").glob("*/step_00000004.png")) or list((tmp_path / "run").rglob("*.png"))
    assert len(reads) == 1
    assert data == ShardsData(folder=tmp_path / "shards"), "what is kept is no part of the settings"
    assert data.describe().num_classes == 10
    write_numbers(tmp_path / "shards", count=5)
    assert data.opened().manifest.samples == 5
    assert data.model_copy(update={"vae": "x"}) != data
    with pytest.raises(ValueError, match=r"data.vae says 'x'"):
        data.model_copy(update={"vae": "x"}).describe()


def ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_cached_data_set_is_read_one_batch_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread: the same batches, what it raises is raised here at that batch, and it ends with the stream."""
    write_numbers(tmp_path)
    options: dict[str, Any] = {"batch_size": 8, "seed": 3}
    expected = list(islice(ShardStream(tmp_path, cache_bytes=0, workers=0, **options), 20))
    made: queue.Queue[tuple[int, str]] = queue.Queue()
    make = RankBatches.__getitem__

    def recorded(self: RankBatches, position: int) -> HostBatch:
        made.put((position, threading.current_thread().name))
        if position in broken:
            raise OSError(f"no batch at {broken.pop()}")
        return make(self, position)

    broken: set[int] = set()
    gc.collect()
    before = len(ahead_threads())
    stream = ShardStream(tmp_path, **options)
    monkeypatch.setattr(RankBatches, "__getitem__", recorded)
    assert next(stream).keys == expected[0].keys
    for position in (0, 8):
        assert made.get(timeout=30) == (position, "prefetch_0"), "without the next batch being asked for"
    for i in range(1, 10):
        assert next(stream).keys == expected[i].keys
        assert stream.batch_at(8 * (19 - i)).keys == expected[19 - i].keys, "the stream stays where it is"
    broken.add(96)
    assert [next(stream).keys for _ in range(2)] == [batch.keys for batch in expected[10:12]]
    with pytest.raises(OSError, match="no batch at 96"):
        next(stream)
    assert stream.state_dict() == {"samples_seen": 96}
    assert next(stream).keys == expected[12].keys, "none is lost"
    stream.load_state_dict({"samples_seen": 40})
    assert [next(stream).keys for _ in range(3)] == [batch.keys for batch in expected[5:8]]
    assert len(ahead_threads()) == before + 1, "a new one each time, and the old one has ended"
    del stream
    gc.collect()
    deadline = time.monotonic() + 30
    while len(ahead_threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ahead_threads()) <= before, "those of other tests may have ended meanwhile"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_condition_of_several_tensors_comes_through_the_loader(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens with their mask, as a data set of another package may have them."""
    write_numbers(tmp_path)

    def tokens(self: RankBatches, samples: list[Sample]) -> dict[str, Any]:
        numbers = torch.tensor([int(sample.key[1:]) for sample in samples])
        return {"tokens": numbers[:, None].expand(-1, 3).clone(), "text": {"mask": numbers > 9}}

    monkeypatch.setattr(RankBatches, "_conditions", tokens)
    batch = next(ShardStream(tmp_path, batch_size=8, seed=0, cache_bytes=0, workers=workers))
    expected = torch.tensor([int(key[1:]) for key in batch.keys])
    assert torch.equal(batch.y["tokens"], expected[:, None].expand(-1, 3))
    assert torch.equal(batch.y["text"]["mask"], expected > 9)


def test_samples_of_any_number_of_dimensions(tmp_path: Path) -> None:
    for shape in ((5,), (2, 3), (2, 3, 4, 5)):
        folder = tmp_path / str(len(shape))
        samples = [Sample(np.full(shape, i, np.float32), i % 2, f"n{i}") for i in range(6)]
        write_shards(samples, folder, samples_per_shard=4, num_classes=2, preprocessing="none")
        data = ShardsData(folder=folder, workers=0)
        assert data.describe().shape == shape
        batch = next(data.open_stream(batch_size=6, seed=0))
        assert batch.data.shape == (6, *shape)
        assert all((row == int(key[1:])).all() for row, key in zip(batch.data, batch.keys, strict=True))
