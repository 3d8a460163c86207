"""The order of samples, over random data sets, seeds, batches, processes, stops: every sample once, always the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcutflow.data.augment import Augmentation, Draws
from shortcutflow.data.manifest import LatentsInfo, Manifest
from shortcutflow.data.order import EpochOrder
from shortcutflow.data.shards import EncodedSample, shard_name, write_shard
from shortcutflow.data.stream import ShardStream
from shortcutflow.types import Batch, BatchSlice
from tests.data.test_stream import write_numbers

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32)
BUFFERS = st.none() | st.integers(1, 120)


def cases(count: int) -> settings:
    """The same cases in every run."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def everything(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]


def check_epochs(order: EpochOrder, sizes: list[int], epochs: range) -> None:
    """Each epoch holds each sample once."""
    total = sum(sizes)
    for epoch in epochs:
        numbers, places = order.at(np.arange(epoch * total, (epoch + 1) * total))
        assert (numbers == epoch).all()
        assert sorted(map(tuple, places.tolist())) == everything(sizes)


def check_access(make: Callable[[], EpochOrder], total: int, positions: list[int]) -> None:
    """Positions asked for in any order, of a new object or a used one, lead to what reading on from 0 comes to."""
    epochs, places = make().at(np.arange(max(positions) + 1))
    used = make()
    for position in positions:
        for order in (make(), used):
            found = order.at(np.array([position]))
            assert found[0] == epochs[position] == position // total
            assert (found[1] == places[position]).all()


@cases(200)
@given(SIZES, SEEDS, BUFFERS, st.integers(0, 10**6))
def test_each_sample_once_an_epoch(sizes: list[int], seed: int, buffer: int | None, epoch: int) -> None:
    check_epochs(EpochOrder(sizes, seed=seed, shuffle_buffer=buffer), sizes, range(epoch, epoch + 2))


@cases(120)
@given(SIZES, SEEDS, BUFFERS, st.lists(st.floats(0, 3, exclude_max=True), min_size=1, max_size=5))
def test_a_position_leads_to_its_sample_from_anywhere(
    sizes: list[int], seed: int, buffer: int | None, at: list[float]
) -> None:
    total = sum(sizes)
    check_access(
        lambda: EpochOrder(sizes, seed=seed, shuffle_buffer=buffer), total, [int(epochs * total) for epochs in at]
    )


@cases(100)
@given(SIZES, SEEDS, BUFFERS, st.integers(0, 100))
def test_blocks_hold_a_buffer_of_whole_shards(sizes: list[int], seed: int, buffer: int | None, epoch: int) -> None:
    """As few shards as fill the buffer, or several, one block after the other until the epoch is over."""
    order = EpochOrder(sizes, seed=seed, shuffle_buffer=buffer)
    place, shards = 0, []
    while place < order.samples:
        block = order.block_at(epoch, place)
        assert block.start == place
        held = [sizes[shard] for shard in block.shards]
        assert len(block.samples) == sum(held)
        assert sorted(map(tuple, block.samples.tolist())) == sorted(
            (shard, number) for shard in block.shards.tolist() for number in range(sizes[shard])
        )
        if buffer is None:
            assert min(4, len(sizes)) <= len(held) <= 8
        else:
            assert sum(held[:-1]) < buffer
            assert sum(held) >= buffer or place + sum(held) == order.samples
        place += len(block.samples)
        shards += block.shards.tolist()
        assert order.block_after(epoch, block).start == place % order.samples
    assert sorted(shards) == list(range(len(sizes)))


@pytest.mark.parametrize("shards", [2, 9, 40])
def test_batches_mix_several_shards_and_others_each_epoch(shards: int) -> None:
    """As data is prepared by default; a buffer of one shard would keep the same 4,096 samples together for ever."""

    def batches(**options: int) -> list[list[set[int]]]:
        order, epoch = EpochOrder([4096] * shards, seed=3, **options), 4096 * shards
        places = [order.at(np.arange(first, first + epoch))[1][:, 0] for first in (0, epoch)]
        return [[set(shard[i : i + 256].tolist()) for i in range(0, epoch, 256)] for shard in places]

    first, second = batches()
    assert min(map(len, first + second)) >= min(4, shards)
    pairs = [{pair for batch in epoch for pair in combinations(sorted(batch), 2)} for epoch in (first, second)]
    assert (pairs[0] == pairs[1]) == (shards <= 8), "other shards meet in the next epoch"
    assert {len(batch) for epoch in batches(shuffle_buffer=4096) for batch in epoch} == {1}


def test_seeds_and_epochs_differ() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        places = EpochOrder([10] * 6, seed=seed, shuffle_buffer=20).at(np.arange(60) + 60 * epoch)[1]
        return [tuple(place) for place in places.tolist()]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(1, 2) == orders[5]
    first_shards = {tuple(dict.fromkeys(shard for shard, _ in one)) for one in orders}
    assert len(first_shards) > 5, "shards are shuffled too, not only what is in a block"


def test_the_order_is_what_it_was() -> None:
    """A run that goes on under another version of this library or of NumPy must find the same order."""
    _, places = EpochOrder([3, 2, 4], seed=5, shuffle_buffer=4).at(np.arange(9, 18))
    assert [tuple(place) for place in places.tolist()] == RECORDED


RECORDED = [(2, 0), (0, 0), (0, 2), (2, 3), (2, 2), (2, 1), (0, 1), (1, 1), (1, 0)]


class OffByOne(EpochOrder):
    """A wrong order: every seventh place gives what the next one gives."""

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super().at(positions)[0], super().at(positions + (positions % 7 == 3))[1]


class WithMemory(EpochOrder):
    """A wrong order: each object shuffles by a generator that goes on."""

    def __init__(self, sizes: list[int], *, seed: int, shuffle_buffer: int) -> None:
        super().__init__(sizes, seed=seed, shuffle_buffer=shuffle_buffer)
        self._generator = np.random.default_rng(seed)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, places = super().at(positions)
        return epochs, self._generator.permutation(places) if len(places) > 1 else super().at(positions + 1)[1]


def test_control_a_wrong_order_is_noticed() -> None:
    sizes = [5, 3, 9]
    check_epochs(EpochOrder(sizes, seed=0, shuffle_buffer=6), sizes, range(2))
    with pytest.raises(AssertionError):
        check_epochs(OffByOne(sizes, seed=0, shuffle_buffer=6), sizes, range(2))
    check_access(lambda: EpochOrder(sizes, seed=0, shuffle_buffer=6), 17, [3, 30, 7])
    with pytest.raises(AssertionError):
        check_access(lambda: WithMemory(sizes, seed=0, shuffle_buffer=6), 17, [3, 30, 7])


class Case(NamedTuple):
    """One training run that stops and goes on with other processes."""

    kind: str
    batch_size: int
    seed: int
    buffer: int | None
    flip: bool
    stop: int
    before: int
    after: int
    cached: bool


def divisors(number: int) -> list[int]:
    return [i for i in (1, 2, 3, 4) if number % i == 0]


@st.composite
def runs(draw: st.DrawFn) -> Case:
    batch_size = draw(st.integers(1, 24))
    kind = draw(st.sampled_from(["images", "moments"]))
    worlds = st.sampled_from(divisors(batch_size))
    return Case(
        kind=kind, batch_size=batch_size, seed=draw(SEEDS), buffer=draw(st.none() | st.integers(1, 40)),
        flip=draw(st.booleans()),
        stop=draw(st.integers(0, 60 // batch_size)), before=draw(worlds), after=draw(worlds),
        cached=draw(st.booleans()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """23 samples each, in shards of different sizes."""
    folder = tmp_path_factory.mktemp("order")
    write_numbers(folder / "images", count=23, samples_per_shard=6)
    write_moments(folder / "moments", [9, 2, 7, 5])
    return {kind: folder / kind for kind in ("images", "moments")}


def write_moments(folder: Path, sizes: list[int], *, mirrored: bool = True, log_variance: float = 0.0) -> Manifest:
    """Moments of latents (1, 2, 2): sample i has mean i everywhere, its mirror image -i - 1."""
    folder.mkdir()
    entries, first = [], 0
    for i, size in enumerate(sizes):
        samples = []
        for number in range(first, first + size):
            moments = np.full((1 + mirrored, 2, 2, 2), log_variance, np.float16)
            moments[:, 0] = np.array([number, -number - 1])[: 1 + mirrored, None, None]
            samples.append(EncodedSample(f"m{number:03d}", moments, "npy", number % 4))
        entry = write_shard(folder / shard_name(i), samples)
        assert entry is not None
        entries.append(entry)
        first += size
    latents = LatentsInfo(vae="test", sha256="0" * 64, scaling_factor=0.5, shift_factor=0.25, mirrored=mirrored)
    manifest = Manifest(
        shape=(1, 2, 2), values="moments", format="npy", latents=latents, num_classes=4, preprocessing="none",
        shards=tuple(entries),
    )  # fmt: skip
    manifest.write(folder)
    return manifest


def open_ranks(folder: Path, case: Case, world_size: int) -> list[ShardStream]:
    return [
        ShardStream(
            folder, batch_size=case.batch_size, seed=case.seed, shuffle_buffer=case.buffer, horizontal_flip=case.flip,
            cache_bytes=2**20 * case.cached, workers=0, rank=rank, world_size=world_size,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def global_batch(parts: list[Batch]) -> Batch:
    """Put together what the ranks got, which must be equally much."""
    assert len({len(part.data) for part in parts}) == 1
    order = np.argsort(np.concatenate([np.arange(len(part.keys)) * len(parts) + r for r, part in enumerate(parts)]))
    keys = [key for part in parts for key in part.keys]
    labels = torch.cat([part.y for part in parts if part.y is not None])
    return Batch(torch.cat([part.data for part in parts])[order], labels[order], tuple(keys[i] for i in order))


def check_run(folder: Path, case: Case) -> None:
    """Stopped, and resumed by other processes, it sees the batches of a run that one process makes without a stop."""
    (whole,) = open_ranks(folder, case._replace(cached=not case.cached), 1)
    count = case.stop + 46 // case.batch_size + 1
    expected = list(islice(whole, count))
    ranks = open_ranks(folder, case, case.before)
    got = [global_batch([next(rank) for rank in ranks]) for _ in range(case.stop)]
    (state,) = {tuple(rank.state_dict().items()) for rank in ranks}
    ranks = open_ranks(folder, case, case.after)
    for rank in ranks:
        rank.load_state_dict(dict(state))
    got += [global_batch([next(rank) for rank in ranks]) for _ in range(count - case.stop)]
    for a, b in zip(got, expected, strict=True):
        assert a.keys == b.keys
        assert a.data.shape[0] == case.batch_size
        assert torch.equal(a.data, b.data)
        assert a.y is not None
        assert b.y is not None
        assert torch.equal(a.y, b.y)
    seen = [key for batch in got for key in batch.keys]
    for start in range(0, len(seen) - 22, 23):
        assert len(set(seen[start : start + 23])) == 23


@cases(120)
@given(case=runs())
def test_a_run_may_stop_and_go_on_with_other_processes(folders: dict[str, Path], case: Case) -> None:
    check_run(folders[case.kind], case)


SOME_CASE = Case("moments", 12, seed=1, buffer=9, flip=True, stop=1, before=2, after=3, cached=False)


def position_after_the_next(self: ShardStream) -> dict[str, int]:
    return {"samples_seen": self._samples_seen + 1}


def overlapping(self: BatchSlice) -> slice:
    return slice(self.index // 2, None, self.count)


def another_order(self: BatchSlice) -> slice:
    return slice(self.count - 1 - self.index, None, self.count)


def by_place_in_the_batch(self: Augmentation, epochs: np.ndarray, samples: np.ndarray) -> Draws:
    return right_draw(self, epochs, np.arange(len(samples)))


right_draw = Augmentation.draw


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (ShardStream, "state_dict", position_after_the_next),
        (BatchSlice, "rows", property(overlapping)),
        (BatchSlice, "rows", property(another_order)),
        (Augmentation, "draw", by_place_in_the_batch),
    ],
    ids=["position", "overlapping slices", "slices in another order", "draws by place"],
)
def test_control_a_wrong_run_is_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, owner: type, name: str, wrong: object
) -> None:
    check_run(folders["moments"], SOME_CASE)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check_run(folders["moments"], SOME_CASE)
