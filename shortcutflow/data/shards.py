"""Writing samples as webdataset shards and reading them back, one by one.

A sample is an image (``.png``) and, with labels, its class (``.cls``). Reading takes these two kinds of member and
no other; nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcutflow.data.manifest import Manifest, ShardEntry

MEMBERS = ("png", "cls")
LARGEST_MEMBER = 64 * 2**20
"""Bytes that one member may have; more is refused before it is decoded."""


class Sample(NamedTuple):
    """One decoded sample: pixels (channels, height, width) uint8, its label if any, and its name."""

    pixels: np.ndarray
    label: int | None
    key: str


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    samples_per_shard: int,
    num_classes: int | None,
    class_names: tuple[str, ...] = (),
    preprocessing: str,
) -> Manifest:
    """Write samples as ``shard-000000.tar``, ... and a manifest.

    The manifest is written last and each shard is renamed into place when complete, so an interrupted call leaves no
    folder that looks finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    shape: tuple[int, ...] | None = None
    for i, chunk in enumerate(_chunks(samples, samples_per_shard)):
        shape = chunk[0].pixels.shape
        entries.append(_write_shard(chunk, folder / f"shard-{i:06d}.tar"))
    if shape is None:
        raise ValueError("there are no samples to write")
    manifest = Manifest(
        shape=shape, num_classes=num_classes, class_names=class_names, preprocessing=preprocessing, shards=entries
    )
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
            members: dict[str, Any] = {"__key__": sample.key, "png": _encode_png(sample.pixels)}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            tar.write(members)
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
    return name.rpartition(".")[2] in MEMBERS


def decode(raw: dict[str, Any], manifest: Manifest) -> Sample:
    """Turn members into a sample.

    Raises:
        ValueError: naming sample and shard, if a member is missing, too large or not what the manifest says.
    """
    key, where = raw["__key__"], f"sample {raw['__key__']!r} of {raw.get('__url__', 'a shard')}"
    for member in MEMBERS[: 1 if manifest.num_classes is None else 2]:
        if member not in raw:
            raise ValueError(f"{where} has no .{member}")
        if len(raw[member]) > LARGEST_MEMBER:
            raise ValueError(f"{where}: its .{member} has {len(raw[member])} bytes, at most {LARGEST_MEMBER} are read")
    pixels = _decode_png(raw["png"], manifest.shape, where)
    if manifest.num_classes is None:
        return Sample(pixels, None, key)
    text = raw["cls"].decode("ascii", errors="replace").strip()
    if not text.isdigit() or int(text) >= manifest.num_classes:
        raise ValueError(f"{where}: its label is {text[:20]!r}, not a number from 0 to {manifest.num_classes - 1}")
    return Sample(pixels, int(text), key)


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def _decode_png(content: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
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
