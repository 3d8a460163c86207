"""Writing samples as webdataset shards and reading them back, one by one.

A sample is an image (``.png``) or an array (``.npy``) and, if it is conditioned, its class (``.cls``) or a tensor
(``.y.npy``). Reading takes these kinds of member and no other; nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcutflow.data.manifest import Manifest, ShardEntry

MEMBERS = ("png", "npy", "cls", "y.npy")
LARGEST_MEMBER = 64 * 2**20
"""Bytes that one member may have; more is refused before it is decoded."""


class Sample(NamedTuple):
    """One decoded sample.

    Attributes:
        data: pixels (channels, height, width) uint8, or any shape of float32.
        y: its label, its condition tensor (float32), or None.
        key: its name.
    """

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
    """Write samples as ``shard-000000.tar``, ... and a manifest.

    The manifest is written last and each shard is renamed into place when complete, so an interrupted call leaves no
    folder that looks finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    first: Sample | None = None
    for i, chunk in enumerate(_chunks(samples, samples_per_shard)):
        first = first or chunk[0]
        entries.append(_write_shard(chunk, folder / f"shard-{i:06d}.tar"))
    if first is None:
        raise ValueError("there are no samples to write")
    manifest = Manifest(
        shape=first.data.shape, values=first.data.dtype.name, num_classes=num_classes,
        condition_shape=first.y.shape if isinstance(first.y, np.ndarray) else None,
        class_names=class_names, preprocessing=preprocessing, shards=tuple(entries),
    )  # fmt: skip
    manifest.write(folder)
    return manifest


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_shard(samples: list[Sample], path: Path) -> ShardEntry:
    from webdataset import TarWriter

    buffer = io.BytesIO()
    # Fixed times and owners: the same samples give the same bytes.
    with TarWriter(buffer, mtime=0.0, user="shortcutflow", group="shortcutflow") as tar:
        for sample in samples:
            tar.write({"__key__": sample.key} | _encode(sample))
    content = buffer.getvalue()
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    digest = hashlib.sha256(content).hexdigest()
    return ShardEntry(name=path.name, samples=len(samples), bytes=len(content), sha256=digest)


def read_shard(path: Path, entry: ShardEntry) -> Iterator[dict[str, Any]]:
    """The undecoded members of each sample of a shard.

    Raises:
        ValueError: if it holds another number of samples than its manifest says.
    """
    from webdataset import WebDataset

    count = 0
    # The path is given as a file, never as a URL that webdataset would hand to a shell.
    dataset = WebDataset(f"file:{path.resolve()}", shardshuffle=False, select_files=_wanted, empty_check=False)
    for raw in dataset:
        count += 1
        yield raw
    if count != entry.samples:
        raise ValueError(f"shard {path} gave {count} samples, its manifest says {entry.samples}: it is damaged")


def _wanted(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2] in MEMBERS


def _encode(sample: Sample) -> dict[str, bytes]:
    members = {"png": _encode_png(sample.data)} if sample.data.dtype == np.uint8 else {"npy": _encode_npy(sample.data)}
    if isinstance(sample.y, np.ndarray):
        members["y.npy"] = _encode_npy(sample.y)
    elif sample.y is not None:
        members["cls"] = str(sample.y).encode()
    return members


def decode(raw: dict[str, Any], manifest: Manifest) -> Sample:
    """Turn members into a sample.

    Raises:
        ValueError: naming sample and shard, if a member is missing, too large or not what the manifest says.
    """
    key, where = raw["__key__"], f"sample {raw['__key__']!r} of {raw.get('__url__', 'a shard')}"

    def content(member: str) -> bytes:
        if member not in raw:
            raise ValueError(f"{where} has no .{member}")
        if len(raw[member]) > LARGEST_MEMBER:
            raise ValueError(f"{where}: its .{member} has {len(raw[member])} bytes, at most {LARGEST_MEMBER} are read")
        return raw[member]

    if manifest.values == "uint8":
        data = _decode_png(content("png"), manifest.shape, where)
    else:
        data = _decode_npy(content("npy"), manifest.shape, f"{where}: its .npy")
    if manifest.condition_shape is not None:
        return Sample(data, _decode_npy(content("y.npy"), manifest.condition_shape, f"{where}: its .y.npy"), key)
    if manifest.num_classes is None:
        return Sample(data, None, key)
    text = content("cls").decode("ascii", errors="replace").strip()
    if not text.isdigit() or int(text) >= manifest.num_classes:
        raise ValueError(f"{where}: its label is {text[:20]!r}, not a number from 0 to {manifest.num_classes - 1}")
    return Sample(data, int(text), key)


def _encode_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array, dtype="<f4"), allow_pickle=False)
    return out.getvalue()


def _decode_npy(content: bytes, shape: tuple[int, ...], what: str) -> np.ndarray:
    file = io.BytesIO(content)
    try:
        # The header is read first: what it promises is not trusted with memory.
        np.lib.format.read_magic(file)
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{what} is not a readable NumPy array: {error}") from error
    if found != shape or dtype != np.dtype("<f4") or fortran:
        raise ValueError(f"{what} is {dtype} {found}, the manifest says float32 {shape}")
    values = content[file.tell() :]
    if len(values) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{what} has {len(values)} bytes of numbers, {dtype.itemsize * math.prod(shape)} are due")
    return np.frombuffer(values, dtype).reshape(shape)


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def _decode_png(content: bytes, shape: tuple[int, ...], where: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            # The size stands in the header; it is compared before any pixel is decompressed.
            if image.size != (width, height):
                raise ValueError(
                    f"{where} is {image.size[0]}x{image.size[1]} pixels, the manifest says {width}x{height}"
                )
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where} is not a readable PNG: {error}") from error
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
