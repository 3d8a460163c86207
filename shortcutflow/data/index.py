"""A shard's index: the byte range and checksum of each sample, its label and its name.

It is a safetensors file of int64 columns, n samples by c copies (a copy is a variant of a sample, such as its mirror
image): ``offset``, ``size``, ``crc`` (n, c); ``label`` (n,) if there are labels; ``condition_offset``, ``..._size``,
``..._crc`` (n,) if there are condition tensors; ``names``, one name a line as bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shortcutflow.data.manifest import ShardEntry
from shortcutflow.io.atomic import write_whole

LARGEST_INDEX = 2**30
LARGEST_SAMPLE = 64 * 2**20
"""Bytes that one encoded sample may have; more is refused before it is read."""


class ByteRange(NamedTuple):
    """Bytes of a shard: the offset of the first, how many, and their CRC-32 (-1 if it is not known)."""

    offset: int
    size: int
    crc: int

    @classmethod
    def of(cls, content: bytes, offset: int) -> ByteRange:
        """The range of this content at this offset."""
        return cls(offset, len(content), zlib.crc32(content))


class IndexRow(NamedTuple):
    """One sample: the bytes of each of its copies, its label, the bytes of its condition tensor, and its name."""

    copies: Sequence[ByteRange]
    label: int | None
    condition: ByteRange | None
    name: str


class Skipped(NamedTuple):
    """A source item that is no sample, and why."""

    name: str
    reason: str


class Index(NamedTuple):
    """What :func:`read_index` returns.

    Attributes:
        offset, size, crc: (n, copies) int64.
        label: (n,) int64, or None.
        condition: (n, 3) int64, offset, size and CRC-32 of each condition tensor, or None.
        names: of the samples.
        entry: of its shard, None for a shard without samples.
        skipped: source items that are no sample.
        version: of a shard that was not written by this library: its version when it was indexed.
    """

    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    label: np.ndarray | None
    condition: np.ndarray | None
    names: tuple[str, ...]
    entry: ShardEntry | None
    skipped: tuple[Skipped, ...]
    version: str = ""


def file_version(file: Path | str | int) -> str:
    """What identifies a local file's content without reading it: its size and time of change."""
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}"


def write_index(
    path: Path,
    rows: Sequence[IndexRow],
    *,
    name: str,
    size: int,
    sha256: str,
    skipped: Sequence[Skipped] = (),
    version: str = "",
) -> ShardEntry | None:
    """Write the index of a shard, complete or not at all.

    Args:
        path: of the index.
        rows: one for each sample.
        name, size, sha256: of the shard: file name, bytes and checksum.
        skipped, version: see :class:`Index`.

    Returns:
        The shard's entry for the manifest; None without samples.
    """
    from safetensors.numpy import save

    ranges = np.array([row.copies for row in rows] or np.empty((0, 1, 3)), dtype=np.int64)
    columns = {name: ranges[..., i] for i, name in enumerate(ByteRange._fields)}
    if rows and rows[0].label is not None:
        columns["label"] = np.array([row.label for row in rows], dtype=np.int64)
    if rows and rows[0].condition is not None:
        conditions = np.array([row.condition for row in rows], dtype=np.int64)
        columns |= {f"condition_{name}": conditions[:, i] for i, name in enumerate(ByteRange._fields)}
    names = "\n".join(" ".join(row.name.split()) for row in rows)
    columns["names"] = np.frombuffer(names.encode(errors="replace"), dtype=np.uint8)
    shard = {"name": name, "samples": len(rows), "bytes": size, "sha256": sha256} if rows else None
    # One entry: safetensors keeps several in no fixed order.
    described = {"entry": shard, "skipped": skipped} | ({"version": version} if version else {})
    contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    content = save(contiguous, {"shard": json.dumps(described)})
    write_whole(path, content)
    return ShardEntry(**shard, index_sha256=hashlib.sha256(content).hexdigest()) if shard else None


def read_index(path: Path, expected: ShardEntry | None = None) -> Index:
    """Read an index and check that it could be one.

    Args:
        path: of the index.
        expected: its shard's entry in the manifest; the index must have the SHA-256 that stands there.

    Raises:
        ValueError: naming the file, if it is damaged or not an index.
    """
    if (size := path.stat().st_size) > LARGEST_INDEX:
        raise ValueError(f"index {path} has {size} bytes, at most {LARGEST_INDEX} are read")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if expected is not None and digest != expected.index_sha256:
        raise ValueError(f"index {path} is damaged: its checksum is not the one in the manifest")
    try:
        index = _parse(content, digest)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"index {path} is damaged: {error}") from error
    if expected is not None and index.entry != expected:
        found = index.entry.name if index.entry is not None else "none"
        raise ValueError(f"index {path} is not that of {expected.name} as the manifest describes it, but of {found}")
    return index


def _parse(content: bytes, digest: str) -> Index:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        columns = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # safetensors has checked the header's length and that its text is JSON.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = json.loads(header["__metadata__"]["shard"])
    stored = described["entry"]
    entry = None if stored is None else ShardEntry.model_validate(stored | {"index_sha256": digest})
    n = entry.samples if entry else 0

    def column(name: str, *shape: int) -> np.ndarray:
        found = columns[name]
        if found.dtype != np.int64 or found.shape != shape:
            raise ValueError(f"a column is {found.dtype} {found.shape}, expected int64 {shape}")
        return found

    def ranges(prefix: str, *shape: int) -> list[np.ndarray]:
        """Offsets, sizes and checksums; every byte range lies inside its shard and is not too large."""
        offset, size, crc = (column(prefix + name, *shape) for name in ByteRange._fields)
        if entry and (offset.min() < 0 or size.min() < 0 or size.max() > LARGEST_SAMPLE):
            raise ValueError(f"a sample's offset or size is impossible (at most {LARGEST_SAMPLE} bytes are read)")
        if entry and (offset > entry.bytes - size).any():  # not their sum, which could overflow
            raise ValueError("a sample lies outside its shard")
        return [offset, size, crc]

    offset, size, crc = ranges("", n, columns["offset"].shape[1] if columns["offset"].ndim == 2 else 1)
    condition = np.stack(ranges("condition_", n), axis=1) if "condition_offset" in columns else None
    label = column("label", n) if "label" in columns else None
    lines = columns["names"].tobytes()
    if n and (found := lines.count(b"\n") + 1) != n:
        raise ValueError(f"{found} names for {n} samples")
    names = tuple(lines.decode(errors="replace").split("\n"))
    skipped = tuple(Skipped(str(name), str(reason)) for name, reason in described["skipped"])
    return Index(offset, size, crc, label, condition, names, entry, skipped, str(described.get("version", "")))
