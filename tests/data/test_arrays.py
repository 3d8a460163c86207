"""Samples that are arrays, conditioned on tensors: written, streamed back exactly, refused when damaged."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from shortcutflow.data.manifest import Manifest
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.data.stream import ShardStream
from tests.data.test_damage import rewrite

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


GOOD, GOOD_Y = npy(np.zeros(SHAPE, np.float32)), npy(np.zeros(CONDITION, np.float32))


def header_of(shape: tuple[int, ...]) -> bytes:
    """An array's beginning, promising a shape whose numbers do not follow."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.npy": GOOD}, r"sample 'a' .* has no \.y\.npy"),
        ({"a.y.npy": GOOD_Y}, r"sample 'a' .* has no \.npy"),
        ({"a.npy": GOOD[:50], "a.y.npy": GOOD_Y}, r"its \.npy is not a readable NumPy array"),
        ({"a.npy": GOOD[:-4], "a.y.npy": GOOD_Y}, r"its \.npy has 44 bytes of numbers, 48 are due"),
        ({"a.npy": header_of((10**9, 10**9)), "a.y.npy": GOOD_Y}, r"the manifest says float32 \(6, 2\)"),
        (
            {"a.npy": npy(np.zeros(SHAPE)), "a.y.npy": GOOD_Y},
            r"its \.npy is float64 \(6, 2\), the manifest says float32",
        ),
        ({"a.npy": GOOD, "a.y.npy": npy(np.zeros((4,), np.float32))}, r"its \.y\.npy is float32 \(4,\)"),
        ({"a.npy": npy(np.array([print], object)), "a.y.npy": GOOD_Y}, r"its \.npy is object \(1,\)"),
        ({"a.npy": pickle.dumps(print), "a.y.npy": GOOD_Y}, r"its \.npy is not a readable NumPy array"),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_damaged_arrays(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    """Refused by their header, before memory is taken; an object array is never unpickled."""
    write_arrays(tmp_path)
    rewrite(tmp_path, members)
    with pytest.raises(ValueError, match=message):
        next(ShardStream(tmp_path, batch_size=14, seed=0))


def test_control_the_good_members_are_read(tmp_path: Path) -> None:
    write_arrays(tmp_path)
    rewrite(tmp_path, {"a.npy": GOOD, "a.y.npy": GOOD_Y})
    samples = Manifest.read(tmp_path).samples
    assert "a" in next(ShardStream(tmp_path, batch_size=samples, seed=0)).keys
