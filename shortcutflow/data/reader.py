"""Reading any sample of a folder of shards by itself, checked against its checksum.

Nothing here follows what a tar's headers say: the index, whose SHA-256 stands in the manifest, tells where the bytes
are, and they are compared with their CRC-32 before they are decoded. So damage is noticed wherever it is.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from contextlib import suppress
from io import BufferedReader

import numpy as np

from shortcutflow.data.index import Index, file_version, read_index
from shortcutflow.data.manifest import ShardEntry
from shortcutflow.data.remote import is_url, with_retries
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Sample, decode, decode_array

OPEN_SHARDS = 64
"""Shards whose files and indexes are kept at once."""


class DamagedSampleError(ValueError):
    """A sample that cannot be read, naming shard and sample."""


class UnreadableShardError(DamagedSampleError):
    """A shard of which no sample can be read, naming it."""


class ShardReader:
    """The samples of a folder of shards, each by the indexes of its shard and of the sample in it."""

    def __init__(self, folder: ShardFolder) -> None:
        self.folder, self.manifest = folder, folder.manifest
        self._shards: OrderedDict[int, tuple[Index, BufferedReader] | str] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        # Another process opens its own files.
        return self.__dict__ | {"_shards": OrderedDict()}

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
            f"shard {self.folder.place_of(self.manifest.shards[shard])} could not be read",
            remedy=": check the disk or network it lies on; --resume then continues the run",
            between=lambda: self._forget(shard),  # a stale handle stays stale
        )

    def stored(self, shard: int, number: int, *, copy: int = 0) -> bytes:
        """One sample as it is stored, with the right checksum; errors of the disk are not retried."""
        index, file = self._opened(shard)
        return _bytes(file, index.offset[number, copy], index.size[number, copy], index.crc[number, copy])

    def close(self) -> None:
        """Close the files."""
        for shard in list(self._shards):
            self._forget(shard)

    def _read(self, shard: int, number: int, copy: int) -> Sample:
        index, file = self._opened(shard)
        name = index.names[number]
        try:
            data = decode(self.stored(shard, number, copy=copy), self.manifest, self.folder.crop)
            return Sample(data, self._condition(file, index, number), name)
        except (ValueError, IndexError) as error:
            raise DamagedSampleError(f"{name} ({self.manifest.shards[shard].name}, {number}): {error}") from error

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

    def _opened(self, shard: int) -> tuple[Index, BufferedReader]:
        """A shard's index and file; those that were not used for longest are closed."""
        entry = self.manifest.shards[shard]
        if shard not in self._shards:
            try:
                self._shards[shard] = self._open(entry)
            except ValueError as error:
                self._shards[shard] = str(error)  # not read again for each of its samples
            if len(self._shards) > OPEN_SHARDS:
                self._forget(next(iter(self._shards)))
        self._shards.move_to_end(shard)
        found = self._shards[shard]
        if isinstance(found, str):
            raise UnreadableShardError(f"all {entry.samples} samples of {entry.name}: {found}")
        return found

    def _open(self, entry: ShardEntry) -> tuple[Index, BufferedReader]:
        index, file = read_index(self.folder.index_of(entry), entry), self.folder.open_shard(entry)
        place = self.folder.place_of(entry)
        if index.version and not is_url(place) and file_version(file.fileno()) != index.version:
            file.close()
            raise ValueError(f"{place} has changed since it was indexed: start again, which indexes it anew")
        return index, file

    def _forget(self, shard: int) -> None:
        found = self._shards.pop(shard, "")
        if not isinstance(found, str):
            with suppress(OSError):
                found[1].close()


def _bytes(file: BufferedReader, offset: np.int64, size: np.int64, crc: np.int64) -> bytes:
    content = os.pread(file.fileno(), int(size), int(offset))
    if len(content) != size:
        raise ValueError(f"the shard ends after {len(content)} of its {size} bytes: it is cut off")
    if crc >= 0 and zlib.crc32(content) != crc:
        raise ValueError("its bytes are not the ones that were written (checksum)")
    return content
