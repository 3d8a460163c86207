"""A folder of shards, local or at a URL: its manifest, and any sample by itself, compared with its checksum.

Nothing here follows what a tar's headers say: the index, whose SHA-256 stands in the manifest, tells where the bytes
are, and they are compared with their CRC-32 before they are decoded. So damage is noticed wherever it is.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcutflow.data.images import Crop
from shortcutflow.data.index import LARGEST_INDEX, Index, Skipped, file_version, read_index
from shortcutflow.data.manifest import MANIFEST, Manifest, ShardEntry
from shortcutflow.data.remote import TRIES, cached_path, is_url, local_copy, open_copy, with_retries
from shortcutflow.data.shards import Sample, decode, decode_array

OPEN_SHARDS = 64
"""Shards whose files and indexes are kept at once."""


class DamagedSampleError(ValueError):
    """A sample that cannot be read, naming shard and sample."""


class UnreadableShardError(DamagedSampleError):
    """A shard of which no sample can be read, naming it."""


class ShardFile(NamedTuple):
    """Where a shard and its index are (path or URL), and what identifies its content."""

    place: str
    index_place: str
    version: str


class ShardFolder:
    """A folder of shards.

    A shard of a URL is fetched whole, compared with the SHA-256 in the manifest and kept on the local disk, where its
    samples are read in any order; every process of a machine uses the same cache.

    Attributes:
        manifest: what the shards hold.
        place: the folder's path or URL.
        crop: how images are made to the manifest's size when they are read; None: they have it.
        skipped: what else the shards hold and is no usable sample.

    Args:
        place: a local folder, or a URL of one.
        cache: where shards of a URL are kept; a folder of its own below it for each URL.
        cache_limit: bytes; beyond it the shards that were not used for longest are deleted. None: no limit.

    Raises:
        FileNotFoundError: if a local folder holds no manifest, or lacks a shard that it lists.
        ValueError: for a manifest that does not parse, or a URL of another kind.
        ReadError: if the manifest cannot be fetched.
    """

    crop: Crop | None = None
    skipped: tuple[Skipped, ...] = ()
    _pool: ThreadPoolExecutor | None = None

    def __init__(self, place: str | Path, *, cache: Path = Path("data/cache"), cache_limit: int | None = None) -> None:
        self.place = str(place).rstrip("/") if is_url(place) else str(place)
        self._cache, self._limit = cache, cache_limit
        self.manifest = Manifest.read(self.place)
        self._watch([] if is_url(place) else [Path(place) / MANIFEST])
        self._files = {
            entry.name: ShardFile(f"{self.place}/{entry.name}", f"{self.place}/{entry.index_name}", entry.sha256)
            for entry in self.manifest.shards
        }
        for file in self._files.values():
            for path in (file.place, file.index_place):
                if not is_url(path) and not Path(path).is_file():
                    raise FileNotFoundError(f"shard {path} is missing, {Path(place) / MANIFEST} lists it")

    @property
    def is_remote(self) -> bool:
        """Whether a shard has a URL."""
        return any(is_url(file.place) for file in self._files.values())

    def __str__(self) -> str:
        return self.place

    def __getstate__(self) -> dict[str, object]:
        # A copy, also in another process, opens its own files.
        return self.__dict__ | {"_ahead": [], "_pool": None, "_opened": OrderedDict()}

    def _watch(self, files: list[Path]) -> None:
        """Remember the versions of the local files whose change makes the folder another one; nothing is open yet."""
        self._watched = {file: file_version(file) for file in files}
        self._ahead: list[ShardEntry] = []
        self._opened: OrderedDict[int, tuple[Index, BufferedReader] | str] = OrderedDict()

    def has_changed(self) -> bool:
        """Whether the data was replaced since it was opened, as far as local files show."""
        try:
            return any(file_version(file) != version for file, version in self._watched.items())
        except OSError:
            return True

    def wrong_sizes(self) -> list[str]:
        """A sentence for each local shard whose file has not the size in the manifest."""
        local = [entry for entry in self.manifest.shards if not is_url(self._place_of(entry))]
        return [
            f"shard {self._place_of(entry)} has {size} bytes, {MANIFEST} says {entry.bytes}: it is damaged or cut off"
            for entry in local
            if (size := os.path.getsize(self._place_of(entry))) != entry.bytes
        ]

    def read(self, shard: int, number: int, *, copy: int = 0) -> Sample:
        """One decoded sample.

        Args:
            shard: index of its shard in the manifest.
            number: its index in the shard.
            copy: which variant of it; of moments, 1 is the mirror image.

        Raises:
            DamagedSampleError: if it cannot be read, is not what was written, or not what the manifest says.
            UnreadableShardError: if no sample of its shard can be read.
            ReadError: if its shard cannot be fetched or read for another reason than its content, in several tries.
        """
        return with_retries(
            lambda: self._read(shard, number, copy),
            f"shard {self._place_of(self.manifest.shards[shard])} could not be read",
            remedy=": check the disk or network it lies on; --resume then continues the run",
            between=lambda: self._close(shard),  # a stale handle stays stale
        )

    def _read(self, shard: int, number: int, copy: int) -> Sample:
        index, file = self._open(shard)
        try:
            data = decode(self.stored(shard, number, copy=copy), self.manifest, self.crop)
            return Sample(data, self._condition(file, index, number), index.names[number])
        except (ValueError, IndexError) as error:
            name = f"{index.names[number]} ({self.manifest.shards[shard].name}, {number})"
            raise DamagedSampleError(f"{name}: {error}") from error

    def stored(self, shard: int, number: int, *, copy: int = 0) -> bytes:
        """One sample as it is stored, with the right checksum; errors of the disk are not retried."""
        index, file = self._open(shard)
        return _bytes(file, index.offset[number, copy], index.size[number, copy], index.crc[number, copy])

    def _condition(self, file: BufferedReader, index: Index, number: int) -> int | np.ndarray | None:
        if self.manifest.condition_shape is not None:
            if index.condition is None:
                raise ValueError("it has no condition tensor")
            content = _bytes(file, *index.condition[number])
            return decode_array(content, self.manifest.condition_shape, np.dtype("<f4"))
        if self.manifest.num_classes is None:
            return None
        if index.label is None:
            raise ValueError("it has no label")
        label = int(index.label[number])
        if not 0 <= label < self.manifest.num_classes:
            raise ValueError(f"its label is {label}, not a number from 0 to {self.manifest.num_classes - 1}")
        return label

    def _open(self, shard: int) -> tuple[Index, BufferedReader]:
        """A shard's index and file; those that were not used for longest are closed."""
        entry = self.manifest.shards[shard]
        if shard not in self._opened:
            try:
                index, place = read_index(self.index_of(entry), entry), self._place_of(entry)
                file = open_copy(place, self._cache, **self._expected(entry))
                self._opened[shard] = index, file
                if index.version and not is_url(place) and file_version(file.fileno()) != index.version:
                    self._close(shard)
                    raise ValueError(f"{place} has changed since it was indexed: start again, which indexes it anew")
            except ValueError as error:
                self._opened[shard] = str(error)  # not read again for each of its samples
            if len(self._opened) > OPEN_SHARDS:
                self._close(next(iter(self._opened)))
        self._opened.move_to_end(shard)
        if isinstance(found := self._opened[shard], str):
            raise UnreadableShardError(f"all {entry.samples} samples of {entry.name}: {found}")
        return found

    def close(self) -> None:
        """Close the files."""
        for shard in list(self._opened):
            self._close(shard)

    def _close(self, shard: int) -> None:
        found = self._opened.pop(shard, "")
        if not isinstance(found, str):
            with suppress(OSError):
                found[1].close()

    def _place_of(self, entry: ShardEntry) -> str:
        return self._files[entry.name].place

    def _expected(self, entry: ShardEntry) -> dict[str, Any]:
        version = self._files[entry.name].version
        return {"version": version, "sha256": entry.sha256, "at_most": entry.bytes, "limit": self._limit}

    def path_of(self, entry: ShardEntry, tries: int = TRIES) -> Path:
        """The local file of a shard, fetched if it is not there yet."""
        return local_copy(self._place_of(entry), self._cache, **self._expected(entry), tries=tries)

    def index_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard's index, fetched if it is not there yet."""
        place, sha256 = self._files[entry.name].index_place, entry.index_sha256
        return local_copy(place, self._cache, version=sha256, sha256=sha256, at_most=LARGEST_INDEX)

    def fetch_ahead(self, entries: list[ShardEntry]) -> None:
        """Begin to fetch shards that will be needed soon; returns at once. Nothing to do for local ones."""
        if entries == self._ahead:
            return
        self._ahead = entries
        for entry in entries:
            place, _, version = self._files[entry.name]
            if is_url(place) and not cached_path(place, self._cache, version).exists():
                self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="shards")
                # One try: the read that needs it tries again and reports the error.
                self._pool.submit(self.path_of, entry, 1)


def _bytes(file: BufferedReader, offset: np.int64, size: np.int64, crc: np.int64) -> bytes:
    content = os.pread(file.fileno(), int(size), int(offset))
    if len(content) != size:
        raise ValueError(f"the shard ends after {len(content)} of its {size} bytes: it is cut off")
    if crc >= 0 and zlib.crc32(content) != crc:
        raise ValueError("its bytes are not the ones that were written (checksum)")
    return content
