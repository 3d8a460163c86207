"""Damaged and hostile shards: refused with a sentence that names them; nothing in them is ever run."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from shortcutflow.data.manifest import Manifest
from shortcutflow.data.stream import ShardStream
from tests.data.test_stream import write_numbers


def rewrite(folder: Path, members: dict[str, bytes]) -> None:
    """Replace the first shard by one with these members, and let the manifest agree about its size."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": path.stat().st_size, "samples": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def good_png(folder: Path) -> bytes:
    with tarfile.open(folder / "shard-000001.tar") as tar:
        member = tar.extractfile("n010.png")
        assert member is not None
        return member.read()


def read_all(folder: Path) -> list[str]:
    stream = ShardStream(folder, batch_size=44, seed=0)
    return list(next(stream).keys)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ShardStream(tmp_path, batch_size=1, seed=0)


def test_missing_shard(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    (tmp_path / "shard-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000002\.tar"):
        ShardStream(tmp_path, batch_size=1, seed=0)


def test_cut_off_shard(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    shard = tmp_path / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"shard-000003\.tar has 5000 bytes"):
        ShardStream(tmp_path, batch_size=1, seed=0)


@pytest.mark.parametrize("name", ["../shard.tar", "/etc/passwd", "pipe:touch x", "a/b.tar", ".hidden"])
def test_manifest_reaches_nowhere_else(tmp_path: Path, name: str) -> None:
    write_numbers(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="plain file name"):
        Manifest.read(tmp_path)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth"])
def test_pickles_are_not_read(tmp_path: Path, extension: str) -> None:
    write_numbers(tmp_path)
    trap = tmp_path / "trap"
    payload = pickle.dumps(Payload(trap))
    rewrite(tmp_path, {"n000.png": good_png(tmp_path), "n000.cls": b"1", f"n000.{extension}": payload})
    assert len(read_all(tmp_path)) == 44
    assert not trap.exists()
    pickle.loads(payload)
    assert trap.exists(), "the payload does run where something unpickles it"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"n000.png": b"not a png", "n000.cls": b"1"}, "not a readable PNG"),
        ({"n000.png": None, "n000.cls": b"3"}, "not a number from 0 to 2"),
        ({"n000.png": None, "n000.cls": b"-1"}, "not a number from 0 to 2"),
        ({"n000.png": None}, r"has no \.cls"),
        ({"n000.cls": b"1"}, r"has no \.png"),
        ({"n000.txt": b"1"}, "gave 0 samples"),
    ],
)
def test_bad_sample_is_named(tmp_path: Path, members: dict[str, bytes | None], says: str) -> None:
    write_numbers(tmp_path)
    png = good_png(tmp_path)
    rewrite(tmp_path, {name: png if content is None else content for name, content in members.items()})
    with pytest.raises(ValueError, match=says) as caught:
        read_all(tmp_path)
    assert "shard-000000.tar" in str(caught.value)


def test_other_size_is_refused_before_decoding(tmp_path: Path) -> None:
    """A PNG whose header claims 30,000 x 30,000 pixels is compared with the manifest, not decompressed."""
    write_numbers(tmp_path)
    png = bytearray(good_png(tmp_path))
    png[16:24] = (30000).to_bytes(4, "big") * 2
    rewrite(tmp_path, {"n000.png": bytes(png), "n000.cls": b"1"})
    with pytest.raises(ValueError, match=r"30000x30000 pixels|not a readable PNG"):
        read_all(tmp_path)
