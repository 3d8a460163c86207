"""Hostile contents behind right checksums: decoders refuse them, run nothing, and take no memory on a promise."""

from __future__ import annotations

import io
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from shortcutflow.data.index import read_index
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.shard_folder import DamagedSampleError, ShardFolder
from shortcutflow.data.shards import EncodedSample, encode_array, write_shard
from shortcutflow.data.stream import ShardStream
from tests.data.hostile import hostile_npy, limited, mutated, peak_memory
from tests.data.test_arrays import header_of
from tests.data.test_damage import Payload, claiming

MOST_MEMORY = 400 * 2**20
"""Bytes by which all cases together may make this process grow."""


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    before = peak_memory()
    yield
    assert peak_memory() - before < MOST_MEMORY


class Format(NamedTuple):
    """A way to store a sample: what a manifest says of it, and a good one."""

    name: str
    manifest: dict[str, Any]
    content: bytes


def formats() -> list[Format]:
    from PIL import Image

    rng = np.random.default_rng(0)
    made = []
    for extension, size, options in (
        ("png", 8, {}), ("jpg", 16, {"quality": 90}), ("jpg", 16, {"progressive": True}), ("webp", 16, {}),
        ("webp", 16, {"lossless": True}),
    ):  # fmt: skip
        out = io.BytesIO()
        pixels = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
        pixels.save(out, {"jpg": "jpeg"}.get(extension, extension), **options)
        name = "-".join([extension, *options])
        made.append(Format(name, {"shape": (3, size, size), "format": extension}, out.getvalue()))
    array = rng.normal(size=(6, 2)).astype(np.float32)
    made.append(Format("npy", {"shape": (6, 2), "values": "float32", "format": "npy"}, encode_array(array)))
    return made


def write_stored(folder: Path, form: Format, contents: list[bytes]) -> Path:
    """A shard of these contents, with the right checksums."""
    folder.mkdir()
    stored = [EncodedSample(f"n{i:03d}", content, form.manifest["format"]) for i, content in enumerate(contents)]
    entry = write_shard(folder / "shard-000000.tar", stored)
    assert entry is not None
    Manifest(preprocessing="none", shards=(entry,), **form.manifest).write(folder)
    return folder


def check_contents(folder: Path, form: Format, contents: list[bytes]) -> list[int]:
    """Each is decoded to what the manifest says, or refused and reported; gives the numbers of the refused ones."""
    write_stored(folder, form, [*contents, form.content])
    reader = ShardFolder(folder)
    refused, messages = [], []
    for number in range(len(contents) + 1):
        try:
            with limited((form.name, number)):
                sample = reader.read(0, number)
            assert sample.data.shape == form.manifest["shape"]
            assert sample.data.dtype == (np.float32 if form.name == "npy" else np.uint8)
        except DamagedSampleError as error:
            refused.append(number)
            messages.append(str(error))
    starts = [f"n{number:03d} (shard-000000.tar, {number}): it " for number in refused]
    assert all(message.startswith(start) for message, start in zip(messages, starts, strict=True))
    assert len(contents) not in refused, "the good one is read"
    stream = ShardStream(folder, batch_size=len(contents) + 1, seed=0, workers=0)
    keys = next(stream).keys
    assert {line.split()[0] for line in stream.damaged} == {f"n{number:03d}" for number in refused}
    assert set(keys) == {f"n{i:03d}" for i in range(len(contents) + 1)} - {f"n{number:03d}" for number in refused}
    return refused


@pytest.mark.filterwarnings("ignore")  # Pillow and NumPy warn about some of them
@pytest.mark.parametrize("form", formats(), ids=lambda form: form.name)
def test_hostile_contents(tmp_path: Path, form: Format) -> None:
    """The checksums are right, so that decoders see them."""
    contents = [mutated(form.content, np.random.default_rng([6, case])) for case in range(200)]
    refused = check_contents(tmp_path / "shards", form, contents)
    assert len(refused) > 40
    assert form.name == "png" or len(refused) < 200, "some change only values"


@pytest.mark.filterwarnings("ignore")  # Pillow and NumPy warn about some of them
def test_hostile_headers_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    contents = hostile_npy(canary)
    refused = check_contents(tmp_path / "shards", formats()[-1], contents)
    assert refused == list(range(len(contents))), "all of them"
    assert not canary.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"shards"}
    pickle.loads(contents[0])
    assert canary.exists(), "where something unpickles it, it does run"


@pytest.mark.filterwarnings("ignore")  # Pillow and NumPy warn about some of them
@pytest.mark.parametrize("form", formats()[:5], ids=lambda form: form.name)
def test_images_of_another_kind(tmp_path: Path, form: Format) -> None:
    """Other formats under the wrong name, other sizes and modes; pickles."""
    from PIL import Image

    contents = [pickle.dumps(Payload(tmp_path / "canary")), b"", form.content * 2]
    size = form.manifest["shape"][1]
    for kind, mode, side in (
        ("gif", "P", size), ("bmp", "RGB", size), ("tiff", "RGB", size), ("ppm", "RGB", size), ("eps", "RGB", size),
        ("png", "RGB", size + 1), ("jpeg", "RGB", size - 1), ("webp", "RGB", 1), ("png", "P", size), ("png", "1", size),
        ("png", "I;16", size), ("png", "LA", size), ("jpeg", "CMYK", size), ("webp", "RGBA", size),
        ("png", "RGBA", size),
    ):  # fmt: skip
        out = io.BytesIO()
        Image.new(mode, (side, side)).save(out, kind)
        contents.append(out.getvalue())
    refused = check_contents(tmp_path / "shards", form, contents)
    assert {0, 1, *range(3, 11)} <= set(refused) | ({8} if form.name == "png" else set())
    assert not (tmp_path / "canary").exists()


def test_memory_follows_no_promise(tmp_path: Path) -> None:
    """What a file claims to hold takes no memory before it is there."""
    promises = [header_of((10**9, 10**9)), header_of((2**30,))]
    png = claiming(formats()[0].content, 30000)
    large = Format("npy", {"shape": (10**9, 10**9), "values": "float32", "format": "npy"}, promises[0])
    folder = write_stored(tmp_path / "large", large, promises)
    huge = Format("png", {"shape": (3, 30000, 30000), "format": "png"}, b"")
    bomb = write_stored(tmp_path / "bomb", huge, [png])
    (tmp_path / "x.index").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        for path in (folder, bomb):
            with pytest.raises(DamagedSampleError, match=r"none of the . samples can be read"):
                next(ShardStream(path, batch_size=2, seed=0, workers=0))
        with pytest.raises(ValueError, match=r"index .* is damaged"):
            read_index(tmp_path / "x.index")
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
