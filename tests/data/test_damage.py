"""Damaged and hostile shards: noticed, named, replaced or refused; nothing in them is ever run."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import pickle
import tarfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from shortcutflow.data.index import read_index
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.remote import ReadError
from shortcutflow.data.shard_folder import DamagedSampleError, ShardFolder
from shortcutflow.data.shards import EncodedSample, Sample, write_shard
from shortcutflow.data.stream import ShardStream
from tests.data.test_stream import write_numbers

COUNT = 53


def rewrite(folder: Path, samples: list[EncodedSample]) -> None:
    """Replace the first shard by one of these samples, with the right checksums everywhere."""
    entry = write_shard(folder / "shard-000000.tar", samples)
    assert entry is not None
    restate(folder, 0, **entry.model_dump())


def restate(folder: Path, shard: int, **values: object) -> None:
    """Let the manifest say something else about a shard."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][shard] |= values
    path.write_text(json.dumps(manifest))


def flip_byte(path: Path, place: int, bits: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


def place_of(folder: Path, shard: int, number: int) -> int:
    """The place in its shard of the middle byte of a sample."""
    index = read_index(folder / f"shard-{shard:06d}.index")
    return int(index.offset[number, 0] + index.size[number, 0] // 2)


def good_png(folder: Path) -> bytes:
    with tarfile.open(folder / "shard-000001.tar") as tar:
        member = tar.extractfile("n010.png")
        assert member is not None
        return member.read()


def claiming(png: bytes, side: int) -> bytes:
    """A PNG whose header gives it another size, with the header's own checksum."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


class Epoch(NamedTuple):
    """What one epoch gave."""

    keys: tuple[str, ...]
    damaged: set[str]


def epoch(folder: Path, on_error: Literal["skip", "raise"] = "skip") -> Epoch:
    stream = ShardStream(folder, batch_size=COUNT, seed=0, on_error=on_error)
    return Epoch(next(stream).keys, stream.damaged)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ShardStream(tmp_path, batch_size=1, seed=0)


@pytest.mark.parametrize("name", ["shard-000002.tar", "shard-000002.index"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    write_numbers(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        ShardStream(tmp_path, batch_size=1, seed=0)


@pytest.mark.parametrize("size", [0, 5000])
def test_cut_off_shard(tmp_path: Path, size: int) -> None:
    """An error at once, or else the samples before the cut and a line for each one after it."""
    write_numbers(tmp_path)
    assert not epoch(tmp_path).damaged
    shard = tmp_path / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"shard-000003\.tar has {size} bytes"):
        ShardStream(tmp_path, batch_size=1, seed=0, on_error="raise")
    stream = epoch(tmp_path)
    index = read_index(tmp_path / "shard-000003.index")
    lost = {name for name, place, length in zip(index.names, index.offset, index.size, strict=True)
            if place + length > size}  # fmt: skip
    assert len(lost) == (10 if size == 0 else 7)
    assert {name.split()[0] for name in stream.damaged} == lost
    assert all("cut off" in name for name in stream.damaged)
    assert set(stream.keys) == {f"n{i:03d}" for i in range(COUNT)} - lost


def test_a_damaged_sample_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for each of the others that it would replace, nor in later epochs."""
    write_numbers(tmp_path)
    shard = tmp_path / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    refused: list[tuple[int, int]] = []
    read = ShardFolder.read

    def counting(self: ShardFolder, shard: int, number: int, *, copy: int = 0) -> Sample:
        try:
            return read(self, shard, number, copy=copy)
        except DamagedSampleError:
            refused.append((shard, number))
            raise

    monkeypatch.setattr(ShardFolder, "read", counting)
    stream = ShardStream(tmp_path, batch_size=COUNT, seed=0, cache_bytes=0, workers=0)
    for _ in range(3):
        next(stream)
    assert len(refused) == len(set(refused)) == 7


@pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["streamed", "cached"])
def test_flipped_byte(tmp_path: Path, cache_bytes: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its sample and no other: the next one of the shard is in its place, in the same batch, at each visit."""
    write_numbers(tmp_path)
    options = {"batch_size": 9, "seed": 3, "cache_bytes": cache_bytes}
    good = [batch.keys for batch in islice(ShardStream(tmp_path, **options), 18)]  # type: ignore[arg-type]
    flip_byte(tmp_path / "shard-000002.tar", place_of(tmp_path, 2, 9), 1)
    stream = ShardStream(tmp_path, **options)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        got = [batch.keys for batch in islice(stream, 18)]
    assert got == [tuple("n020" if key == "n029" else key for key in keys) for keys in good]
    assert sum(key == "n029" for keys in good for key in keys) >= 3, "it came in every epoch"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{next(iter(stream.damaged))}; another takes its place (1 so far)"
    assert line.startswith("n029 (shard-000002.tar, 9): its bytes are not the ones that were written")
    with pytest.raises(DamagedSampleError, match=r"n029 \(shard-000002\.tar, 9\): .*checksum"):
        list(islice(ShardStream(tmp_path, on_error="raise", **options), 6))  # type: ignore[arg-type]


def test_a_resumed_run_replaces_by_the_same(tmp_path: Path) -> None:
    """What takes a damaged sample's place is no matter of what was read before."""
    write_numbers(tmp_path)
    for number in (3, 4, 8):
        flip_byte(tmp_path / "shard-000001.tar", place_of(tmp_path, 1, number))
    stream = ShardStream(tmp_path, batch_size=8, seed=0, cache_bytes=0)
    for done in range(20):
        resumed = ShardStream(tmp_path, batch_size=8, seed=0, cache_bytes=2**20 * (done % 2))
        resumed.load_state_dict(stream.state_dict())
        assert next(resumed).keys == next(stream).keys


def test_flips_outside_of_the_content_change_nothing(tmp_path: Path) -> None:
    """Negative control: headers and padding of the tar are not read, so damage there costs nothing."""
    write_numbers(tmp_path)
    before = epoch(tmp_path)
    index = read_index(tmp_path / "shard-000000.index")
    end = int(index.offset[0, 0] + index.size[0, 0])
    assert end % 512, "there is padding"
    for place in (0, 100, 300, end, end + 1):
        flip_byte(tmp_path / "shard-000000.tar", place)
    after = epoch(tmp_path, "raise")
    assert after.keys == before.keys
    flip_byte(tmp_path / "shard-000000.tar", end - 1)
    assert len(epoch(tmp_path).damaged) == 1


@pytest.mark.parametrize("damage", ["flipped", "of another shard", "cut off", "empty"])
def test_damaged_index(tmp_path: Path, damage: str) -> None:
    """Without its index a shard is lost, which one line says."""
    write_numbers(tmp_path)
    path = tmp_path / "shard-000001.index"
    match damage:
        case "flipped":
            flip_byte(path, 400)
        case "of another shard":
            path.write_bytes((tmp_path / "shard-000002.index").read_bytes())
        case "cut off":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
    stream = epoch(tmp_path)
    (line,) = stream.damaged
    assert line.startswith("all 10 samples of shard-000001.tar: index ")
    assert "its checksum is not the one in the manifest" in line
    assert len(stream.keys) == COUNT
    assert set(stream.keys) == {f"n{i:03d}" for i in range(COUNT) if not 10 <= i < 20}
    with pytest.raises(DamagedSampleError, match=r"shard-000001\.tar: index .* is damaged"):
        epoch(tmp_path, "raise")


def test_index_of_another_shard_that_the_manifest_names(tmp_path: Path) -> None:
    """A manifest that gives one shard another's index would mislabel it."""
    write_numbers(tmp_path)
    other = Manifest.read(tmp_path).shards[2]
    (tmp_path / "shard-000001.index").write_bytes((tmp_path / "shard-000002.index").read_bytes())
    restate(tmp_path, 1, index_sha256=other.index_sha256)
    with pytest.raises(DamagedSampleError, match=r"not that of shard-000001\.tar .*, but of shard-000002\.tar"):
        epoch(tmp_path, "raise")


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    """Not an endless search."""
    write_numbers(tmp_path, count=20)
    for shard in (0, 1):
        for number in range(10):
            flip_byte(tmp_path / f"shard-{shard:06d}.tar", place_of(tmp_path, shard, number))
    with pytest.raises(DamagedSampleError, match=r"none of the 20 samples can be read: n\d+ "):
        epoch(tmp_path)
    for shard in (0, 1):
        (tmp_path / f"shard-{shard:06d}.index").write_bytes(b"")
    with pytest.raises(DamagedSampleError, match=r"none of the 20 samples can be read: all 10 samples of shard-"):
        epoch(tmp_path)


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_workers_tell_what_is_damaged(tmp_path: Path, on_error: Literal["skip", "raise"]) -> None:
    write_numbers(tmp_path)
    flip_byte(tmp_path / "shard-000002.tar", place_of(tmp_path, 2, 4))
    stream = ShardStream(tmp_path, batch_size=COUNT, seed=0, workers=1, on_error=on_error)
    if on_error == "raise":
        with pytest.raises(DamagedSampleError, match=r"n024 \(shard-000002\.tar, 4\)"):
            next(stream)
    else:
        assert "n024" not in next(stream).keys
        assert [name.split()[0] for name in stream.damaged] == ["n024"]


@pytest.mark.parametrize("name", ["../shard.tar", "/etc/passwd", "pipe:touch x", "a/b.tar", ".hidden.tar", "a\n.tar"])
def test_manifest_reaches_nowhere_else(tmp_path: Path, name: str) -> None:
    write_numbers(tmp_path)
    restate(tmp_path, 0, name=name)
    with pytest.raises(ValueError, match="plain file name"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"samples": 10**18}, "shards.0.samples"),
        ({"samples": 0}, "shards.0.samples"),
        ({"bytes": 10**30}, "shards.0.bytes"),
        ({"sha256": "0"}, "shards.0.sha256"),
        ({"name": "shard-000001.tar"}, "two shards have the same name"),
        ({"more": 1}, "shards.0.more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_manifest(tmp_path: Path, values: dict[str, object], says: str) -> None:
    write_numbers(tmp_path)
    restate(tmp_path, 0, **values)
    with pytest.raises(ValueError, match=says):
        Manifest.read(tmp_path)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth"])
def test_pickles_are_not_read(tmp_path: Path, extension: str) -> None:
    """Whatever else lies in a shard, even under a sample's own key."""
    write_numbers(tmp_path)
    trap = tmp_path / "trap"
    payload = pickle.dumps(Payload(trap))
    png = good_png(tmp_path)
    rewrite(tmp_path, [EncodedSample("n000", png, "png", 1), EncodedSample("n000", payload, extension, 1)])
    stream = epoch(tmp_path)
    assert "n000" in stream.keys
    assert len(stream.damaged) == 1, "as an image it is none"
    assert not trap.exists()
    pickle.loads(payload)
    assert trap.exists(), "control"


@pytest.mark.parametrize(
    ("content", "label", "says"),
    [
        (b"not a png", 1, "not a readable PNG"),
        (b"", 1, "not a readable PNG"),
        (None, 3, "its label is 3, not a number from 0 to 2"),
        (None, -1, "its label is -1, not a number from 0 to 2"),
        (None, None, "it has no label"),
    ],
    ids=["other content", "no content", "label too large", "negative label", "no label"],
)
def test_bad_sample_is_named(tmp_path: Path, content: bytes | None, label: int | None, says: str) -> None:
    """Also where every checksum is right."""
    write_numbers(tmp_path)
    rewrite(tmp_path, [EncodedSample("n000", good_png(tmp_path) if content is None else content, "png", label)])
    with pytest.raises(DamagedSampleError, match=rf"n000 \(shard-000000\.tar, 0\): .*{says}"):
        epoch(tmp_path, "raise")
    assert [name.split()[0] for name in epoch(tmp_path).damaged] == ["n000"]


def test_control_a_good_sample_is_read(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    rewrite(tmp_path, [EncodedSample("good", good_png(tmp_path), "png", 1)])
    assert "good" in epoch(tmp_path, "raise").keys


def test_other_size_is_refused_before_decoding(tmp_path: Path) -> None:
    """A PNG whose header claims 30,000 x 30,000 pixels is compared with the manifest, not decompressed."""
    write_numbers(tmp_path)
    for side, says in ((30000, "not a readable PNG: .*decompression bomb"), (5000, "5000x5000 pixels"), (3, "3x3 p")):
        rewrite(tmp_path, [EncodedSample("n000", claiming(good_png(tmp_path), side), "png", 1)])
        with pytest.raises(DamagedSampleError, match=rf"n000 .*{says}"):
            epoch(tmp_path, "raise")


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["pread", "open"])
def test_an_error_of_the_disk_is_not_damage(
    fault: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again with growing pauses: every sample once an epoch, and the stream equals one without errors."""
    write_numbers(tmp_path)
    options = {"batch_size": 8, "seed": 3, "shuffle_buffer": 16, "cache_bytes": 0, "workers": 0}
    twin = ShardStream(tmp_path, **options)  # type: ignore[arg-type]
    want = [next(twin).keys for _ in range(20)]
    pauses: list[float] = []
    monkeypatch.setattr("shortcutflow.data.remote.time.sleep", pauses.append)
    owner: Any = os if call == "pread" else Path
    real, calls = getattr(owner, call), itertools.count()

    def failing(path: object, *args: object, **options: object) -> object:
        # Two failures in a row, now and then; other files are none of its business.
        if (call == "pread" or str(path).endswith(".tar")) and next(calls) % 7 < 2:
            raise OSError(fault, os.strerror(fault))
        return real(path, *args, **options)

    monkeypatch.setattr(owner, call, failing)
    stream = ShardStream(tmp_path, **options)  # type: ignore[arg-type]
    assert [next(stream).keys for _ in range(9)] == want[:9]
    resumed = ShardStream(tmp_path, **options)  # type: ignore[arg-type]
    resumed.load_state_dict(stream.state_dict())
    assert [next(resumed).keys for _ in range(11)] == want[9:]
    assert not stream.damaged | resumed.damaged
    assert {1.0, 2.0} <= set(pauses)


def test_a_disk_that_stays_away_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbers(tmp_path)
    pauses: list[float] = []
    monkeypatch.setattr("shortcutflow.data.remote.time.sleep", pauses.append)

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    stream = ShardStream(tmp_path, batch_size=8, seed=3, on_error="skip")
    with pytest.raises(ReadError, match=r"shard .*shard-00000\d\.tar could not be read in 5 tries: .*--resume"):
        next(stream)
    assert pauses == [1, 2, 4, 8]
    assert not stream.damaged
