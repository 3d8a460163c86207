"""The format of shards: samples encoded into tar files that webdataset reads, each with an index, and decoded again.

A shard is a plain tar: ``KEY.jpg`` and ``KEY.cls`` for an image and its class, ``KEY.npy`` for
an array or for the moments of a latent, ``KEY.y.npy`` for the tensor it is conditioned on. The index makes each sample
readable by itself (:mod:`shortcutflow.data.shard_folder`).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from shortcutflow.data.images import Crop, encode_image, read_image, to_square
from shortcutflow.data.index import ByteRange, Index, IndexRow, Skipped, read_index, write_index
from shortcutflow.data.manifest import LatentsInfo, Manifest, ShardEntry
from shortcutflow.io.atomic import atomic_file

if TYPE_CHECKING:
    from webdataset import TarWriter

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


class EncodedSample(NamedTuple):
    """One encoded sample.

    Attributes:
        key: base name of its members, of letters, digits, "_" and "-".
        content: the encoded image or array; or moments (copies, 2 channels, h, w) of an image and its mirror image.
        extension: how: "png", "jpg", "webp" or "npy".
        label: its class, or None.
        condition: the float32 tensor it is conditioned on, or None.
        name: where it came from, for messages; the key if empty.
    """

    key: str
    content: bytes | np.ndarray
    extension: str
    label: int | None = None
    condition: np.ndarray | None = None
    name: str = ""


class Sample(NamedTuple):
    """One sample in memory: its data, a label, a condition tensor or None, and its name."""

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
    latents: LatentsInfo | None = None,
) -> Manifest:
    """Write samples from memory as ``shard-000000.tar``, ... and a manifest.

    Their data are uint8 images, stored as PNG; float32 arrays of any shape; or, with ``latents``, float16 moments
    (copies, 2 channels, h, w), copy 1 those of the mirror image.

    The manifest is written last and each shard is renamed into place when complete, so an interrupted call leaves no
    folder that looks finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    first: Sample | None = None
    remaining = iter(samples)
    for i, chunk in enumerate(iter(lambda: list(islice(remaining, samples_per_shard)), [])):
        first = first or chunk[0]
        entry = write_shard(folder / shard_name(i), map(_encode, chunk))
        assert entry is not None
        entries.append(entry)
    if first is None:
        raise ValueError("there are no samples to write")
    is_image, shape = first.data.dtype == np.uint8, first.data.shape
    manifest = Manifest(
        shape=shape if latents is None else (shape[1] // 2, *shape[2:]),
        values="moments" if latents is not None else "uint8" if is_image else "float32",
        format="png" if is_image else "npy",
        latents=latents,
        num_classes=num_classes,
        condition_shape=first.y.shape if isinstance(first.y, np.ndarray) else None,
        class_names=class_names,
        preprocessing=preprocessing,
        shards=tuple(entries),
    )
    manifest.write(folder)
    return manifest


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[EncodedSample | Skipped]) -> ShardEntry | None:
    """Write one shard and its index, and return its entry for the manifest; the same samples make the same bytes.

    The tar is renamed into place when it is complete and on the disk, then the index: a shard with an index is
    complete. Without samples there is only an index, and no entry.

    Raises:
        ValueError: for a key that could not be a member's name, naming it.
    """
    from webdataset import TarWriter

    skipped: list[Skipped] = []
    rows: list[IndexRow] = []
    with atomic_file(path) as unfinished, unfinished.open("w+b") as file:
        # Time 0, and no name of an owner: the same samples make the same bytes.
        with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
            for sample in samples:
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                else:
                    rows.append(_add_sample(tar, sample))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not rows:
        path.unlink()
    return write_index(path.with_suffix(".index"), rows, name=path.name, size=size, sha256=sha256, skipped=skipped)


def finished_shard(path: Path) -> Index | None:
    """The index of a shard that was written completely before; None if it was not. The shard is not read through."""
    index_path = path.with_suffix(".index")
    if not index_path.is_file():
        return None
    index = read_index(index_path)
    if index.entry is not None and (not path.is_file() or path.stat().st_size != index.entry.bytes):
        return None
    return index


def _add_member(tar: TarWriter, key: str, extension: str, content: bytes) -> int:
    """Append a member; returns the offset of its content in the shard."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"a sample's key must be 1 to 80 letters, digits, '_' or '-', got {key!r}")
    tar.write({"__key__": key, extension: content})
    return tar.tarstream.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add_sample(tar: TarWriter, sample: EncodedSample) -> IndexRow:
    condition = None
    if isinstance(sample.content, bytes):
        content = sample.content
        size, starts = len(content), range(1)
    else:  # copies follow the header of the array, and have a byte range each
        content = encode_array(sample.content, "<f2")
        size = 2 * sample.content[0].size
        starts = range(len(content) - size * len(sample.content), len(content), size)
    offset = _add_member(tar, sample.key, sample.extension, content)
    copies = [ByteRange.of(content[start : start + size], offset + start) for start in starts]
    if sample.label is not None:
        _add_member(tar, sample.key, "cls", str(sample.label).encode())
    if sample.condition is not None:
        array = encode_array(sample.condition)
        condition = ByteRange.of(array, _add_member(tar, sample.key, "y.npy", array))
    return IndexRow(copies, sample.label, condition, sample.name or sample.key)


def _encode(sample: Sample) -> EncodedSample:
    condition = sample.y if isinstance(sample.y, np.ndarray) else None
    label = None if condition is not None or sample.y is None else int(sample.y)
    if sample.data.dtype == np.uint8:
        return EncodedSample(sample.key, encode_image(sample.data, "png"), "png", label, condition)
    content = sample.data if sample.data.dtype == np.float16 else encode_array(sample.data)
    return EncodedSample(sample.key, content, "npy", label, condition)


def encode_array(array: np.ndarray, dtype: Literal["<f4", "<f2"] = "<f4") -> bytes:
    """The bytes of a ``.npy`` file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
    return out.getvalue()


def decode(content: bytes, manifest: Manifest, crop: Crop | None = None) -> np.ndarray:
    """A sample's values: pixels (channels, height, width) uint8, float32, or float16 moments (2 channels, h, w).

    Args:
        content: the encoded sample.
        manifest: says what it is.
        crop: of an image of any format and size: how it becomes the size in the manifest. None: it must have that.

    Raises:
        ValueError: if it is not what the manifest says.
    """
    if manifest.values == "moments":
        channels, *size = manifest.shape
        shape = (2 * channels, *size)
        if len(content) != 2 * math.prod(shape):
            raise ValueError(f"it has {len(content)} bytes, expected {2 * math.prod(shape)}")
        return np.frombuffer(content, dtype="<f2").reshape(shape)
    if manifest.values == "float32":
        return decode_array(content, manifest.shape, np.dtype("<f4"))
    if crop is not None:
        return np.moveaxis(np.asarray(to_square(read_image(content), manifest.shape[-1], crop)), -1, 0)
    return _decode_image(content, manifest.shape, manifest.format)


def decode_array(content: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array of a ``.npy`` file.

    Raises:
        ValueError: if it has another shape or type; what its header promises is not trusted with memory.
    """
    file = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its format is not version 1.0")
        found, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:
        # A hostile header is parsed as Python literals, which fails in many ways.
        raise ValueError(f"it is not a readable NumPy array: {error}") from error
    if found != shape or found_dtype != dtype or fortran:
        raise ValueError(f"it is an array of {found_dtype} {found}, the manifest says {dtype} {shape}")
    values = content[file.tell() :]
    if len(values) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"it has {len(values)} bytes of numbers, expected {dtype.itemsize * math.prod(shape)}")
    return np.frombuffer(values, dtype).reshape(shape)


def _decode_image(content: bytes, shape: tuple[int, ...], extension: str) -> np.ndarray:
    from PIL import Image

    channels, height, width = shape
    name = {"jpg": "JPEG"}.get(extension, extension.upper())
    try:
        with Image.open(io.BytesIO(content), formats=[name]) as image:
            # The size stands in the header; it is compared before any pixel is decompressed.
            if image.size != (width, height):
                raise ValueError(f"it is {image.size[0]}x{image.size[1]} pixels, the manifest says {width}x{height}")
            mode = "L" if channels == 1 else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except ValueError:
        raise
    except Exception as error:
        # Whatever a decoder makes of hostile bytes; some errors of Pillow's derive from Exception alone.
        raise ValueError(f"it is not a readable {name}: {error}") from error
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
