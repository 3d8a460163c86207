"""Writing webdataset shards, each with an index that says where in it every sample lies.

A shard is a plain tar that webdataset reads: ``KEY.jpg`` and ``KEY.cls`` for an image and its class, ``KEY.npy`` for
an array, ``KEY.y.npy`` for the tensor it is conditioned on. Moments of latents lie many to a member, which costs less
for whoever reads the tar. The index makes each sample readable by itself (:mod:`shortcutflow.data.reader`).
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import numpy as np

from shortcutflow.data.index import Extent, IndexBuilder, read_index, write_index
from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.io.atomic import atomic_file

if TYPE_CHECKING:
    from webdataset import TarWriter

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


class Stored(NamedTuple):
    """One encoded sample.

    Attributes:
        key: base name of its members, of letters, digits, "_" and "-".
        content: the encoded image or array.
        extension: how: "png", "jpg", "webp" or "npy".
        label: its class, or None.
        condition: the float32 tensor it is conditioned on, or None.
        name: where it came from, for messages; the key if empty.
    """

    key: str
    content: bytes
    extension: str
    label: int | None = None
    condition: np.ndarray | None = None
    name: str = ""


class StoredPack(NamedTuple):
    """Samples that lie in one member.

    Attributes:
        key: base name of the member.
        arrays: (n, copies, ...), float16; a copy is a variant of a sample (its mirror image).
        labels: of each sample, or None.
        names: where each came from.
    """

    key: str
    arrays: np.ndarray
    labels: tuple[int, ...] | None
    names: tuple[str, ...]


class Skipped(NamedTuple):
    """A source item that gave no sample, and why."""

    name: str
    reason: str


class WrittenShard(NamedTuple):
    """A shard's entry for the manifest (None if every item was skipped) and what was skipped."""

    entry: ShardEntry | None
    skipped: tuple[Skipped, ...]


class Sample(NamedTuple):
    """One sample in memory: data (uint8 pixels or float32), a label, a condition tensor or None, and its name."""

    data: np.ndarray
    y: int | np.ndarray | None
    key: str


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    samples_per_shard: int,
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    preprocessing: str,
) -> Manifest:
    """Write samples from memory as ``shard-000000.tar``, ... and a manifest; images as PNG.

    The manifest is written last and each shard is renamed into place when complete, so an interrupted call leaves no
    folder that looks finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    first: Sample | None = None
    for i, chunk in enumerate(_chunks(samples, samples_per_shard)):
        first = first or chunk[0]
        written = write_shard(folder / shard_name(i), (_encode(sample) for sample in chunk))
        assert written.entry is not None
        entries.append(written.entry)
    if first is None:
        raise ValueError("there are no samples to write")
    is_image = first.data.dtype == np.uint8
    manifest = Manifest(
        shape=first.data.shape, values="uint8" if is_image else "float32", format="png" if is_image else "npy",
        num_classes=num_classes, condition_shape=first.y.shape if isinstance(first.y, np.ndarray) else None,
        class_names=class_names, preprocessing=preprocessing, shards=tuple(entries),
    )  # fmt: skip
    manifest.write(folder)
    return manifest


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def write_shard(path: Path, samples: Iterable[Stored | StoredPack | Skipped]) -> WrittenShard:
    """Write one shard and its index; the same samples give the same bytes.

    The tar is renamed into place when it is whole and on the disk, then the index: a shard with an index is complete.

    Raises:
        ValueError: for a key that could not be a member's name, naming it.
    """
    from webdataset import TarWriter

    skipped: list[Skipped] = []
    index = IndexBuilder()
    with atomic_file(path) as unfinished, unfinished.open("wb") as file:
        shard = _HashedFile(file)
        # Time 0, and no name of an owner: the same samples give the same bytes.
        with TarWriter(shard, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
            for sample in samples:
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                elif isinstance(sample, StoredPack):
                    _add_pack(tar, index, sample)
                else:
                    _add_sample(tar, index, sample)
    entry = None
    if index.samples:
        entry = ShardEntry(
            name=path.name, samples=index.samples, bytes=shard.size, sha256=shard.digest(), index_sha256="0" * 64
        )
    else:
        path.unlink()  # an empty tar
    digest = write_index(path.with_suffix(".index"), index, entry, [tuple(item) for item in skipped])
    if entry is not None:
        entry = entry.model_copy(update={"index_sha256": digest})
    return WrittenShard(entry, tuple(skipped))


def written_shard(path: Path) -> WrittenShard | None:
    """A shard that was written completely before; None if it was not. It is not read through."""
    index_path = path.with_suffix(".index")
    if not index_path.is_file():
        return None
    index = read_index(index_path)
    skipped = tuple(Skipped(name, reason) for name, reason in index.skipped)
    if index.entry is None:
        return WrittenShard(None, skipped)
    if not path.is_file() or path.stat().st_size != index.entry.bytes:
        return None
    return WrittenShard(index.entry, skipped)


class _HashedFile:
    """A file to write to that knows the SHA-256 and size of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self._hash.update(content)
        self.size += len(content)
        return self._file.write(content)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _add_member(tar: TarWriter, key: str, extension: str, content: bytes) -> int:
    """Append a member; gives the place of its content in the shard."""
    tar.write({"__key__": key, extension: content})
    return tar.tarstream.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add_sample(tar: TarWriter, index: IndexBuilder, sample: Stored) -> None:
    key = _checked_key(sample.key)
    place = _add_member(tar, key, sample.extension, sample.content)
    condition = None
    if sample.label is not None:
        _add_member(tar, key, "cls", str(sample.label).encode())
    if sample.condition is not None:
        content = encode_array(sample.condition)
        condition = Extent.of(content, _add_member(tar, key, "y.npy", content))
    index.add([Extent.of(sample.content, place)], sample.label, condition, sample.name or key)


def _add_pack(tar: TarWriter, index: IndexBuilder, pack: StoredPack) -> None:
    key = _checked_key(pack.key)
    content = encode_array(pack.arrays, "<f2")
    place = _add_member(tar, key, "npy", content)
    if pack.labels is not None:
        _add_member(tar, key, "cls.npy", encode_array(np.array(pack.labels), "<i8"))
    size = pack.arrays[0, 0].size * 2
    # Rows follow the header one after the other; each copy is an extent of its own.
    start = len(content) - pack.arrays.size * 2
    for i, name in enumerate(pack.names):
        extents = []
        for copy in range(pack.arrays.shape[1]):
            begin = start + (i * pack.arrays.shape[1] + copy) * size
            extents.append(Extent.of(content[begin : begin + size], place + begin))
        index.add(extents, pack.labels[i] if pack.labels is not None else None, None, name)


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"a sample's key must be 1 to 80 letters, digits, '_' or '-', got {key!r}")
    return key


def _encode(sample: Sample) -> Stored:
    condition = sample.y if isinstance(sample.y, np.ndarray) else None
    label = None if condition is not None or sample.y is None else int(sample.y)
    if sample.data.dtype == np.uint8:
        return Stored(sample.key, _encode_png(sample.data), "png", label, condition)
    return Stored(sample.key, encode_array(sample.data), "npy", label, condition)


def encode_array(array: np.ndarray, dtype: Literal["<f4", "<f2", "<i8"] = "<f4") -> bytes:
    """The bytes of a ``.npy`` file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
    return out.getvalue()


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    Image.fromarray(image).save(out, "png")
    return out.getvalue()
