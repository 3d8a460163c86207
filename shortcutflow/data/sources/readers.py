"""The images of a source, and reading their bytes from files, parts of files and zip archives.

Names inside an archive are only names: nothing is ever unpacked onto the disk.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from shortcutflow.data.images import ImageError
from shortcutflow.data.index import Skipped

LARGEST_ITEM = 256 * 2**20
"""Bytes of one encoded image; a larger one is skipped."""

OPEN_FILES = 64
_ZIP_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, ..., length of its name, length of its extra field


class RawItem(NamedTuple):
    """A file in a source: its name with "/" between folders, its label or None, and where its reader finds it."""

    name: str
    label: int | None
    place: tuple[int | str, ...]


class Block(NamedTuple):
    """Items ``start`` ... ``stop`` - 1, which are read together, and the bytes that this takes in memory."""

    start: int
    stop: int
    bytes: int


class Reader(Protocol):
    """Reads an item's encoded image; it can be pickled, and opens its files again in another process."""

    files: tuple[Path, ...]

    def read(self, item: RawItem) -> bytes:
        """Raises ImageError if the item itself is damaged or too large, OSError if its file cannot be read now."""


@dataclass(frozen=True)
class RawSource:
    """Raw images, in an order that depends on their names alone.

    Attributes:
        kind: in words, for messages.
        reader: of their bytes.
        items: sorted.
        class_names: of labels 0, 1, ...; empty if there are no labels.
        skipped: what was found and is no sample, with the reason.
        blocks: of items that are cheap to read only together; empty if any order will do.
        notes: what was decided and is worth a look.
    """

    kind: str
    reader: Reader
    items: Sequence[RawItem]
    class_names: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    blocks: tuple[Block, ...] = ()
    notes: tuple[str, ...] = ()

    def read(self, item: RawItem) -> bytes:
        """The bytes of one item, see :meth:`Reader.read`."""
        return self.reader.read(item)

    def print_notes(self) -> None:
        """To standard error: what was decided, and how much is left out for which reason."""
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)
        first = {item.reason: item.name for item in reversed(self.skipped)}
        for reason, count in Counter(item.reason for item in self.skipped).most_common(5):
            print(f"left out: {count} such as {first[reason]}: {reason}", file=sys.stderr)

    def fingerprint(self) -> str:
        """SHA-256 of names, labels, sizes and places: another one means that the source has changed."""
        digest = hashlib.sha256(repr((self.kind, self.class_names, self.skipped)).encode())
        for file in self.reader.files:
            digest.update(repr((file.name, file.stat().st_size)).encode())
        for item in self.items:
            digest.update(repr(tuple(item)).encode())
        return digest.hexdigest()


class FolderReader:
    """Files below a folder; a place is (path below it, bytes)."""

    files: tuple[Path, ...] = ()

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, item: RawItem) -> bytes:
        """See :class:`Reader`."""
        path, _ = item.place
        with (self.root / str(path)).open("rb") as file:
            content = file.read(LARGEST_ITEM + 1)
        check_bytes(len(content))
        return content


class RangeReader:
    """Parts of files, such as the members of tar archives; a place is (number of the file, offset, bytes)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def read(self, item: RawItem) -> bytes:
        """See :class:`Reader`."""
        return self._part(*(int(value) for value in item.place))

    def _part(self, number: int, offset: int, size: int) -> bytes:
        check_bytes(size)
        if number not in self._open:
            self._open[number] = self.files[number].open("rb", buffering=0)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        content = os.pread(self._open[number].fileno(), size, offset)
        if len(content) != size:
            raise ImageError(f"{self.files[number]} ends before its {size} bytes do")
        return content


class ZipReader(RangeReader):
    """Members of a zip archive; a place is (offset of its header, bytes compressed, bytes, method, CRC-32).

    Read by place, so that a worker need not parse the directory of a million members first, as zipfile would.
    """

    def read(self, item: RawItem) -> bytes:
        """See :class:`Reader`."""
        offset, compressed, size, method, crc = (int(value) for value in item.place)
        check_bytes(size)
        signature, name_length, extra_length = _ZIP_HEADER.unpack(self._part(0, offset, _ZIP_HEADER.size))
        if signature != b"PK\x03\x04":
            raise ImageError("damaged: its header in the zip archive is not where the directory says")
        content = self._part(0, offset + _ZIP_HEADER.size + name_length + extra_length, compressed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than promised is enough to see that a promise is broken.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise ImageError(f"damaged: {error}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise ImageError("damaged: its checksum in the zip archive does not agree")
        return content


def check_bytes(size: int) -> None:
    """Raise ImageError for more bytes than are read."""
    if size > LARGEST_ITEM:
        raise ImageError(f"it has {size} bytes or more, at most {LARGEST_ITEM} are read")
