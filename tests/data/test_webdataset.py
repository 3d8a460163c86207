"""Shards are plain webdataset: others read the same samples in the order in which they were written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Sample, write_shards
from tests.data.test_order import write_moments

webdataset = pytest.importorskip("webdataset")


def read_here(folder: Path) -> list[Sample]:
    reader = ShardFolder(folder)
    return [
        reader.read(shard, number)
        for shard, entry in enumerate(reader.manifest.shards)
        for number in range(entry.samples)
    ]


def read_there(folder: Path) -> list[dict[str, Any]]:
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(paths, shardshuffle=False))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_classes(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    written = [Sample(rng.integers(0, 256, (channels, 5, 4), np.uint8), i % 3, f"n{i:02d}") for i in range(25)]
    write_shards(written, tmp_path, samples_per_shard=10, num_classes=3, preprocessing="none")
    here, there = read_here(tmp_path), read_there(tmp_path)
    assert [item["__key__"] for item in there] == [sample.key for sample in here] == [s.key for s in written]
    for item, sample, original in zip(there, here, written, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(item["png"])))
        pixels = pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
        assert np.array_equal(pixels, sample.data)
        assert np.array_equal(pixels, original.data)
        assert int(item["cls"]) == sample.y == original.y


def test_its_decoders_know_the_extensions(tmp_path: Path) -> None:
    written = [Sample(np.full((3, 2, 2), i, np.uint8), i, f"n{i}") for i in range(5)]
    write_shards(written, tmp_path, samples_per_shard=5, num_classes=5, preprocessing="none")
    dataset = webdataset.WebDataset([str(tmp_path / "shard-000000.tar")], shardshuffle=False)
    pairs = list(dataset.decode("rgb8").to_tuple("png", "cls"))
    assert [(int(image[0, 0, 0]), label) for image, label in pairs] == [(i, i) for i in range(5)]


def test_arrays_and_conditions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = [
        Sample(rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=3).astype(np.float32), f"n{i}")
        for i in range(7)
    ]
    write_shards(written, tmp_path, samples_per_shard=4, preprocessing="none")
    paths = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    there = list(webdataset.WebDataset(paths, shardshuffle=False).decode().to_tuple("npy", "y.npy"))
    for (data, condition), original, sample in zip(there, written, read_here(tmp_path), strict=True):
        assert np.array_equal(data, original.data)
        assert np.array_equal(condition, original.y)
        assert np.array_equal(data, sample.data)


def test_moments_come_with_their_copies(tmp_path: Path) -> None:
    """Those of image and mirror image as one array, beside the label."""
    write_moments(tmp_path / "moments", [4, 3])
    urls = sorted(map(str, (tmp_path / "moments").glob("*.tar")))
    there = list(webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "cls"))
    assert {moments.shape for moments, _ in there} == {(2, 2, 2, 2)}
    here = read_here(tmp_path / "moments")
    assert np.array_equal(np.stack([moments[0] for moments, _ in there]), np.stack([s.data for s in here]))
    assert [label for _, label in there] == [sample.y for sample in here]


def test_names_that_webdataset_would_split_are_refused(tmp_path: Path) -> None:
    """A dot in a key would begin the extension."""
    for key in ("a.b", "", "a/b", "../a", "é", "a" * 81):
        with pytest.raises(ValueError, match="a sample's key must be"):
            write_shards([Sample(np.zeros((1, 2, 2), np.uint8), None, key)], tmp_path, samples_per_shard=1,
                         preprocessing="none")  # fmt: skip
