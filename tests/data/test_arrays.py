"""Samples that are arrays, conditioned on tensors: written, streamed back exactly, refused when damaged."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from shortcutflow.data.index import read_index
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.shard_folder import DamagedSampleError
from shortcutflow.data.shards import EncodedSample, Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.data.stream import ShardStream
from tests.data.test_damage import flip_byte, rewrite

COUNT, SHAPE, CONDITION = 20, (6, 2), (3,)


def write_arrays(folder: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = [
        Sample(rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=CONDITION).astype(np.float32), f"n{i:02d}")
        for i in range(COUNT)
    ]
    write_shards(samples, folder, samples_per_shard=7, preprocessing="none")
    return samples


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_round_trip_is_exact(tmp_path: Path, cache_bytes: int) -> None:
    written = {sample.key: sample for sample in write_arrays(tmp_path)}
    info = ShardsData(folder=tmp_path).describe()
    assert (info.shape, info.num_classes, info.condition_shape, info.null_y) == (SHAPE, None, CONDITION, 0.0)
    assert not info.is_picture
    stream = ShardStream(tmp_path, batch_size=5, seed=0, cache_bytes=cache_bytes)
    batches = [next(stream) for _ in range(COUNT // 5)]
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted(written), "an epoch sees each sample once"
    for batch in batches:
        assert batch.data.dtype == torch.float32
        assert batch.y is not None
        for i, key in enumerate(batch.keys):
            assert np.array_equal(batch.data[i], written[key].data)
            assert np.array_equal(batch.y[i], written[key].y)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


GOOD = npy(np.zeros(SHAPE, np.float32))


def header_of(shape: tuple[int, ...]) -> bytes:
    """An array's beginning, promising a shape whose numbers do not follow."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable NumPy array"),
        (GOOD[:50], "not a readable NumPy array"),
        (GOOD[:-4], "it has 44 bytes of numbers, expected 48"),
        (GOOD + b"more", "it has 52 bytes of numbers, expected 48"),
        (header_of((10**9, 10**9)), r"the manifest says float32 \(6, 2\)"),
        (npy(np.zeros(SHAPE)), r"an array of float64 \(6, 2\), the manifest says float32"),
        (npy(np.asfortranarray(np.zeros(SHAPE, np.float32))), "an array of float32"),
        (npy(np.array([print], object)), r"an array of object \(1,\)"),
        (GOOD[:6] + b"\x02" + GOOD[7:], "not version 1.0"),
        (pickle.dumps(print), "not a readable NumPy array"),
        (GOOD.replace(b"'descr'", b"(((((((").replace(b"}", b" "), "not a readable NumPy array"),
        (GOOD.replace(b"'descr'", b"1      "), "not a readable NumPy array"),
    ],
    ids=[
        "empty", "cut header", "cut numbers", "more numbers", "huge shape", "other type", "other layout", "objects",
        "other version", "pickle", "no literal", "keys of two types",
    ],
)  # fmt: skip
def test_damaged_arrays(tmp_path: Path, content: bytes, message: str) -> None:
    """Refused by their header, before memory is taken; an object array is never unpickled."""
    write_arrays(tmp_path)
    rewrite(tmp_path, [EncodedSample("a", content, "npy", condition=np.zeros(CONDITION, np.float32))])
    with pytest.raises(DamagedSampleError, match=rf"a \(shard-000000\.tar, 0\): .*{message}"):
        next(ShardStream(tmp_path, batch_size=14, seed=0, on_error="raise"))
    stream = ShardStream(tmp_path, batch_size=14, seed=0)
    assert "a" not in next(stream).keys
    assert len(stream.damaged) == 1


@pytest.mark.parametrize(
    ("condition", "message"),
    [(None, "it has no condition tensor"), (np.zeros(4, np.float32), r"an array of float32 \(4,\)")],
    ids=["none", "other shape"],
)
def test_damaged_conditions(tmp_path: Path, condition: np.ndarray | None, message: str) -> None:
    write_arrays(tmp_path)
    rewrite(tmp_path, [EncodedSample("a", GOOD, "npy", condition=condition)])
    with pytest.raises(DamagedSampleError, match=message):
        next(ShardStream(tmp_path, batch_size=14, seed=0, on_error="raise"))


def test_flipped_byte_in_a_condition(tmp_path: Path) -> None:
    """Conditions have checksums of their own."""
    write_arrays(tmp_path)
    index = read_index(tmp_path / "shard-000001.index")
    assert index.condition is not None
    flip_byte(tmp_path / "shard-000001.tar", int(index.condition[2, 0] + index.condition[2, 1] - 1), 1)
    with pytest.raises(DamagedSampleError, match=r"n09 \(shard-000001\.tar, 2\): .*checksum"):
        next(ShardStream(tmp_path, batch_size=COUNT, seed=0, on_error="raise"))


def test_control_the_good_sample_is_read(tmp_path: Path) -> None:
    write_arrays(tmp_path)
    rewrite(tmp_path, [EncodedSample("a", GOOD, "npy", condition=np.zeros(CONDITION, np.float32))])
    samples = Manifest.read(tmp_path).samples
    assert "a" in next(ShardStream(tmp_path, batch_size=samples, seed=0, on_error="raise")).keys
