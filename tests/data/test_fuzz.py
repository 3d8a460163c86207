"""Thousands of damaged and hostile files: each is refused or skipped and reported, none hangs, fills memory or runs."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from shortcutflow.data import shard_folder
from shortcutflow.data.index import read_index
from shortcutflow.data.manifest import MOST_SAMPLES, Manifest
from shortcutflow.data.shard_folder import DamagedSampleError, ShardFolder
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.stream import ShardStream
from tests.data.hostile import limited, mutated, peak_memory, rewritten_index, with_hostile_value
from tests.data.test_damage import flip_byte, restate
from tests.data.test_order import write_moments

KINDS = ("images", "arrays", "moments")
MOST_MEMORY = 400 * 2**20
"""Bytes by which all cases together may make this process grow."""


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    before = peak_memory()
    yield
    assert peak_memory() - before < MOST_MEMORY


class Folder(NamedTuple):
    """A folder of shards, what its first epoch gives undamaged, and the shard of each sample."""

    path: Path
    epoch: Epoch
    shards: dict[str, str]


class Epoch(NamedTuple):
    """Names of samples, their data and conditions as bytes, and what was reported as damaged."""

    keys: tuple[str, ...]
    contents: list[bytes]
    damaged: set[str]


def epoch_of(path: Path) -> Epoch:
    stream = ShardStream(path, batch_size=Manifest.read(path).samples, seed=0, workers=0)
    batch = next(stream)
    assert batch.y is not None
    rows = zip(batch.data.numpy(), batch.y.numpy(), strict=True)
    return Epoch(batch.keys, [data.tobytes() + y.tobytes() for data, y in rows], stream.damaged)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Two shards of ten samples each."""
    root = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    images = [Sample(rng.integers(0, 256, (3, 8, 8), np.uint8), i % 3, f"n{i:02d}") for i in range(20)]
    write_shards(images, root / "images", samples_per_shard=10, num_classes=3, preprocessing="none")
    arrays = [
        Sample(rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=3).astype(np.float32), f"n{i:02d}")
        for i in range(20)
    ]
    write_shards(arrays, root / "arrays", samples_per_shard=10, preprocessing="none")
    write_moments(root / "moments", [10, 10], mirrored=False, log_variance=-1000.0)
    made = {}
    for kind in KINDS:
        epoch = epoch_of(root / kind)
        assert not epoch.damaged
        entries = Manifest.read(root / kind).shards
        shards = {name: e.name for e in entries for name in read_index(root / kind / e.index_name).names}
        made[kind] = Folder(root / kind, epoch, shards)
    return made


@contextmanager
def copied(folder: Folder, place: Path) -> Iterator[Path]:
    shutil.copytree(folder.path, place)
    yield place
    shutil.rmtree(place)


def check_losses(folder: Folder, path: Path, case: object) -> int:
    """Whatever is not the same as before was reported, and nothing was altered; gives how much was reported."""
    try:
        with limited(case):
            keys, contents, damaged = epoch_of(path)
    except (ValueError, FileNotFoundError):
        return -1
    assert len(keys) == len(folder.epoch.keys)
    written = dict(zip(folder.epoch.keys, folder.epoch.contents, strict=True))
    for key, content in zip(keys, contents, strict=True):
        assert written[key] == content, f"case {case}: {key} is not what was written"
    lost_shards = {line.split(":")[0].rpartition(" ")[2] for line in damaged if line.startswith("all ")}
    lost = {line.split()[0] for line in damaged if not line.startswith("all ")}
    for was, now in zip(folder.epoch.keys, keys, strict=True):
        assert was == now or was in lost or folder.shards[was] in lost_shards, f"case {case}: {was} went unreported"
    assert not {key for key in keys if key in lost or folder.shards[key] in lost_shards}
    return len(damaged)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_shards(folders: dict[str, Folder], tmp_path: Path, kind: str) -> None:
    reported = []
    for case in range(250):
        rng = np.random.default_rng([1, case])
        with copied(folders[kind], tmp_path / "copy") as path:
            shard = path / f"shard-00000{case % 2}.tar"
            shard.write_bytes(mutated(shard.read_bytes(), rng))
            reported.append(check_losses(folders[kind], path, (kind, case)))
    assert min(reported) >= 0, "the other shard always gives samples"
    assert sum(count > 0 for count in reported) > 40
    assert 0 in reported, "some of it lies outside of all samples"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_indexes(folders: dict[str, Folder], tmp_path: Path, kind: str) -> None:
    """Any change is noticed; what the index of the other shard describes is still read."""
    for case in range(120):
        rng = np.random.default_rng([2, case])
        with copied(folders[kind], tmp_path / "copy") as path:
            index = path / f"shard-00000{case % 2}.index"
            content = index.read_bytes()
            index.write_bytes(mutated(content, rng))
            changed = index.read_bytes() != content
            assert check_losses(folders[kind], path, (kind, case)) == changed


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_in_a_sample_is_noticed(folders: dict[str, Folder], tmp_path: Path, kind: str) -> None:
    with copied(folders[kind], tmp_path / "copy") as path:
        for case in range(150):
            rng = np.random.default_rng([3, case])
            shard, number = int(rng.integers(0, 2)), int(rng.integers(0, 10))
            index = read_index(path / f"shard-00000{shard}.index")
            place = int(index.offset[number, 0] + rng.integers(0, index.size[number, 0]))
            bit = 1 << int(rng.integers(0, 8))
            shards = ShardFolder(path)
            flip_byte(path / f"shard-00000{shard}.tar", place, bit)
            with pytest.raises(DamagedSampleError, match="checksum"):
                shards.read(shard, number)
            flip_byte(path / f"shard-00000{shard}.tar", place, bit)
            shards.read(shard, number)
            shards.close()


@pytest.mark.parametrize("kind", KINDS)
def test_control_what_is_around_the_samples_does_not_matter(
    folders: dict[str, Folder], tmp_path: Path, kind: str
) -> None:
    """All members renamed, all headers overwritten, all padding filled: the same samples, and nothing reported."""
    for name in ("../../x", "/etc/passwd", "n00.pkl", "|touch x"):
        with copied(folders[kind], tmp_path / "copy") as path:
            for shard in path.glob("*.tar"):
                index, content = read_index(shard.with_suffix(".index")), bytearray(shard.read_bytes())
                kept = np.zeros(len(content), bool)
                extents = [*zip(index.offset.ravel(), index.size.ravel(), strict=True)]
                extents += [(row[0], row[1]) for row in index.condition] if index.condition is not None else []
                for offset, size in extents:
                    kept[offset : offset + size] = True
                with tarfile.open(shard) as tar:
                    headers = [member.offset for member in tar.getmembers()]
                noise = np.frombuffer(np.random.default_rng(0).bytes(len(content)), np.uint8)
                changed = np.where(kept, np.frombuffer(content, np.uint8), noise)
                for offset in headers:
                    changed[offset : offset + len(name)] = np.frombuffer(name.encode(), np.uint8)
                shard.write_bytes(changed.tobytes())
            assert check_losses(folders[kind], path, (kind, name)) == 0


def test_control_a_reader_without_checksums_is_noticed(
    folders: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_folder, "_bytes", lambda file, offset, size, crc: os.pread(file.fileno(), size, offset))
    with copied(folders["arrays"], tmp_path / "copy") as path:
        assert check_losses(folders["arrays"], path, "whole") == 0
        index = read_index(path / "shard-000000.index")
        flip_byte(path / "shard-000000.tar", int(index.offset[4, 0] + index.size[4, 0] - 1))
        with pytest.raises(AssertionError, match="case flipped: n04 is not what was written"):
            check_losses(folders["arrays"], path, "flipped")


def test_hostile_manifests(folders: dict[str, Folder], tmp_path: Path) -> None:
    """A manifest may say what it likes: it is refused, or something is read, or samples are reported."""
    outcomes, messages = [], []
    for case in range(600):
        rng = np.random.default_rng([4, case])
        with copied(folders[KINDS[case % 3]], tmp_path / "copy") as path:
            manifest = path / "manifest.json"
            content = manifest.read_bytes()
            if case % 2:
                content = json.dumps(with_hostile_value(json.loads(content), rng)).encode()
            else:
                content = mutated(content, rng)
            manifest.write_bytes(content)
            try:
                with limited((case, content[:300])):
                    stream = ShardStream(path, batch_size=4, seed=0, workers=0)
                    next(stream)
                outcomes.append("read")
            except (ValueError, FileNotFoundError) as error:
                outcomes.append("refused")
                messages.append(str(error))
    assert all(messages)
    assert outcomes.count("refused") > 200
    assert outcomes.count("read") > 10, "words and settings may say anything"


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_indexes_that_the_manifest_vouches_for(folders: dict[str, Folder], tmp_path: Path, kind: str) -> None:
    """With the right checksum, an index is still not trusted: it leads to samples that were written, or to none."""
    refused, undamaged = 0, folders[kind].epoch.contents
    data = len(undamaged[0]) - (12 if kind == "arrays" else 8)
    for case in range(200):
        rng = np.random.default_rng([5, case])
        with copied(folders[kind], tmp_path / "copy") as path:
            index = path / "shard-000000.index"
            content = index.read_bytes()
            content = rewritten_index(content, rng) if case % 4 else mutated(content, rng)
            index.write_bytes(content)
            restate(path, 0, index_sha256=sha256(content).hexdigest())
            with limited((kind, case)):
                _, contents, damaged = epoch_of(path)
            refused += bool(damaged)
            # It may name and label them otherwise: it is the index that says so.
            assert {content[:data] for content in contents} <= {content[:data] for content in undamaged}
    assert refused > 150


def test_a_shard_that_claims_the_most_samples(folders: dict[str, Folder], tmp_path: Path) -> None:
    """It is lost at once, not sample by sample."""
    with copied(folders["images"], tmp_path / "copy") as path:
        restate(path, 0, samples=MOST_SAMPLES)
        stream = ShardStream(path, batch_size=4, seed=0, workers=0)
        with limited("most samples"):
            assert len(next(stream).keys) == 4
        assert len(stream.damaged) <= 1
