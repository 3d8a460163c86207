"""A shard's index: where each sample's bytes lie, their checksum, its label and its name.

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
"""Bytes that one stored sample may have; more is refused before it is read."""


class Extent(NamedTuple):
    """A run of bytes in a shard: where it begins, its length and CRC-32 (-1 if it is not known)."""

    offset: int
    size: int
    crc: int

    @classmethod
    def of(cls, content: bytes, offset: int) -> Extent:
        """The extent of this content at this place."""
        return cls(offset, len(content), zlib.crc32(content))


def file_version(file: Path | str | int) -> str:
    """What tells a local file's content from a later one without reading it: its size and time of change."""
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}"


class IndexBuilder:
    """Collects the rows of an index while its shard is written."""

    def __init__(self) -> None:
        self._copies: list[list[Extent]] = []
        self._labels: list[int | None] = []
        self._conditions: list[Extent | None] = []
        self._names: list[str] = []

    @property
    def samples(self) -> int:
        """Rows so far."""
        return len(self._copies)

    def add(self, copies: list[Extent], label: int | None, condition: Extent | None, name: str) -> None:
        """Append one sample."""
        self._copies.append(copies)
        self._labels.append(label)
        self._conditions.append(condition)
        self._names.append(" ".join(name.split()))

    def columns(self) -> dict[str, np.ndarray]:
        """The finished columns."""
        extents = np.array(self._copies or np.empty((0, 1, 3)), dtype=np.int64)
        columns = {name: np.ascontiguousarray(extents[..., i]) for i, name in enumerate(Extent._fields)}
        if self.samples and self._labels[0] is not None:
            columns["label"] = np.array(self._labels, dtype=np.int64)
        if self.samples and self._conditions[0] is not None:
            conditions = np.array(self._conditions, dtype=np.int64)
            for i, name in enumerate(Extent._fields):
                columns[f"condition_{name}"] = np.ascontiguousarray(conditions[:, i])
        columns["names"] = np.frombuffer("\n".join(self._names).encode(errors="replace"), dtype=np.uint8)
        return columns


class Index(NamedTuple):
    """What :func:`read_index` gives.

    Attributes:
        offset, size, crc: (n, copies) int64.
        label: (n,) int64, or None.
        condition: (n, 3) int64, offset, size and CRC-32 of each condition tensor, or None.
        names: of the samples.
        entry: of its shard, None for a shard without samples.
        skipped: (name, reason) of source items that gave no sample.
        version: of a shard that was not written here: what it was recognised by when it was indexed.
    """

    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    label: np.ndarray | None
    condition: np.ndarray | None
    names: tuple[str, ...]
    entry: ShardEntry | None
    skipped: tuple[tuple[str, str], ...]
    version: str = ""


def write_index(
    path: Path, builder: IndexBuilder, entry: ShardEntry | None, skipped: Sequence[tuple[str, ...]], version: str = ""
) -> str:
    """Write it, whole or not at all; gives its SHA-256."""
    from safetensors.numpy import save

    shard = entry.model_dump_json(exclude={"index_sha256"}) if entry is not None else "null"
    # One entry: safetensors keeps several in no fixed order.
    described = {"entry": json.loads(shard), "skipped": skipped} | ({"version": version} if version else {})
    metadata = {"shard": json.dumps(described)}
    content = save(builder.columns(), metadata)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


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
    entry = None
    if described["entry"] is not None:
        entry = ShardEntry.model_validate(described["entry"] | {"index_sha256": digest})
    n = entry.samples if entry is not None else 0
    extents = [columns[name] for name in Extent._fields]
    copies = extents[0].shape[1] if extents[0].ndim == 2 else 1
    _check_columns(extents, (n, copies))
    _check_places(extents[0], extents[1], entry)
    condition = None
    if "condition_offset" in columns:
        parts = [columns[f"condition_{name}"] for name in Extent._fields]
        _check_columns(parts, (n,))
        _check_places(parts[0], parts[1], entry)
        condition = np.stack(parts, axis=1)
    label = columns.get("label")
    _check_columns([label] if label is not None else [], (n,))
    lines = columns["names"].tobytes()
    if n and (found := lines.count(b"\n") + 1) != n:
        raise ValueError(f"{found} names for {n} samples")
    names = tuple(lines.decode(errors="replace").split("\n"))
    skipped = tuple((str(name), str(reason)) for name, reason in described["skipped"])
    offset, size, crc = extents
    return Index(offset, size, crc, label, condition, names, entry, skipped, str(described.get("version", "")))


def _check_columns(columns: list[np.ndarray], shape: tuple[int, ...]) -> None:
    for column in columns:
        if column.dtype != np.int64 or column.shape != shape:
            raise ValueError(f"a column is {column.dtype} {column.shape}, int64 {shape} is due")


def _check_places(offset: np.ndarray, size: np.ndarray, entry: ShardEntry | None) -> None:
    """Every extent lies inside its shard and is not too large."""
    if entry is None:
        return
    if offset.min() < 0 or size.min() < 0 or size.max() > LARGEST_SAMPLE:
        raise ValueError(f"a sample's place or size is impossible (at most {LARGEST_SAMPLE} bytes are read)")
    # Not their sum, which could overflow.
    if (offset > entry.bytes - size).any():
        raise ValueError("a sample lies outside its shard")
