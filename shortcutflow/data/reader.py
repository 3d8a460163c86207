"""Reading any sample of a folder of shards by itself, checked against its checksum.

Nothing here follows what a tar's headers say: the index, whose SHA-256 stands in the manifest, tells where the bytes
are, and they are compared with their CRC-32 before they are decoded. So damage is noticed wherever it is.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np

from shortcutflow.data.images import Crop, read_image, to_square
from shortcutflow.data.index import Index, file_version, read_index
from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.data.remote import FetchError, is_url
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Sample

OPEN_SHARDS = 64
"""Shards whose files and indexes are kept at once."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try of a shard that the system could not read."""
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class DamagedSampleError(ValueError):
    """A sample that cannot be read, naming shard and sample."""


class LostShardError(DamagedSampleError):
    """A shard of which no sample can be read, naming it."""


class ReadError(OSError):
    """A shard that the system could not read in several tries, naming it."""


class ShardReader:
    """The samples of a folder of shards, each by shard and number.

    Args:
        folder: of shards, local or remote.

    Raises:
        FileNotFoundError, ValueError: without a valid manifest.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self.folder = folder
        self.manifest = folder.manifest
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, Index | str] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        # Another process opens its own files.
        return self.__dict__ | {"_files": OrderedDict()}

    def read(self, shard: int, number: int, *, copy: int = 0) -> Sample:
        """One decoded sample.

        Args:
            shard: position of its shard in the manifest.
            number: its position in the shard.
            copy: which variant of it; of moments, 1 is the mirror image.

        Raises:
            DamagedSampleError: if it cannot be read, is not what was written, or not what the manifest says.
            LostShardError: if no sample of its shard can be read.
            FetchError: if its shard cannot be fetched, which says nothing about the sample.
            ReadError: if its shard cannot be read for another reason than its content, in several tries.
        """
        return self._retried(shard, lambda: self._read(shard, number, copy))

    def _read(self, shard: int, number: int, copy: int) -> Sample:
        index, file = self._opened(shard)
        name = index.names[number]
        try:
            content = _stored(file, index, number, copy)
            return Sample(decode(content, self.manifest, self.folder.crop), self._condition(file, index, number), name)
        except (ValueError, IndexError) as error:
            raise DamagedSampleError(f"{name} ({self.manifest.shards[shard].name}, {number}): {error}") from error

    def stored(self, shard: int, number: int, *, copy: int = 0) -> bytes:
        """One sample as it is stored, with the right checksum; raises as :meth:`read` does."""

        def read() -> bytes:
            index, file = self._opened(shard)
            try:
                return _stored(file, index, number, copy)
            except (ValueError, IndexError) as error:
                raise DamagedSampleError(f"sample {number} of {self.manifest.shards[shard].name}: {error}") from error

        return self._retried(shard, read)

    def labels(self, shard: int) -> np.ndarray | None:
        """All labels of a shard, (n,) int64, without reading its samples."""
        return self._retried(shard, lambda: self._index(shard)).label

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _opened(self, shard: int) -> tuple[Index, int]:
        """A shard's index and file."""
        try:
            index = self._index(shard)
            return index, self._file(shard, index.version)
        except ValueError as error:
            entry = self.manifest.shards[shard]
            raise LostShardError(f"all {entry.samples} samples of {entry.name}: {error}") from error

    def _retried(self, shard: int, action: Callable[[], Result]) -> Result:
        """Do it; after an error of the disk or network again, with growing pauses: that says nothing about the data.

        Raises:
            ReadError: naming the shard, when the last try failed too.
        """
        for pause in (*PAUSES, None):
            try:
                return action()
            except FetchError:  # which was tried several times already
                raise
            except OSError as error:
                path = self.folder.place_of(self.manifest.shards[shard].name)
                if pause is None:
                    raise ReadError(
                        f"shard {path} could not be read in {len(PAUSES) + 1} tries ({error}): check the disk or "
                        "network it lies on; --resume then continues the run"
                    ) from error
                logger.warning("shard %s could not be read (%s); trying again in %g s", path, error, pause)
                time.sleep(pause)
                if shard in self._files:  # a stale handle stays stale
                    with suppress(OSError):
                        os.close(self._files.pop(shard))
        raise AssertionError("unreachable")

    def _condition(self, file: int, index: Index, number: int) -> int | np.ndarray | None:
        if self.manifest.condition_shape is not None:
            if index.condition is None:
                raise ValueError("it has no condition tensor")
            content = _bytes(file, *(int(value) for value in index.condition[number]))
            return decode_array(content, self.manifest.condition_shape, np.dtype("<f4"))
        if self.manifest.num_classes is None:
            return None
        if index.label is None:
            raise ValueError("it has no label")
        label = int(index.label[number])
        if not 0 <= label < self.manifest.num_classes:
            raise ValueError(f"its label is {label}, not a number from 0 to {self.manifest.num_classes - 1}")
        return label

    def _index(self, shard: int) -> Index:
        if shard not in self._indexes:
            if len(self._indexes) >= OPEN_SHARDS:
                self._indexes.popitem(last=False)
            entry = self.manifest.shards[shard]
            try:
                self._indexes[shard] = read_index(self.folder.index_of(entry), entry)
            except ValueError as error:
                # Not read again for each of its samples.
                self._indexes[shard] = str(error)
        self._indexes.move_to_end(shard)
        index = self._indexes[shard]
        if isinstance(index, str):
            raise ValueError(index)
        return index

    def _file(self, shard: int, version: str) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._open(self.manifest.shards[shard], version)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, entry: ShardEntry, version: str) -> int:
        place = self.folder.place_of(entry.name)
        while is_url(place):
            with suppress(FileNotFoundError):  # another process may just have deleted it to make room
                return os.open(self.folder.path_of(entry), os.O_RDONLY)
        file = os.open(place, os.O_RDONLY)
        if version and file_version(file) != version:
            os.close(file)
            raise ValueError(f"{place} has changed since it was indexed: start again, which indexes it anew")
        return file


def _stored(file: int, index: Index, number: int, copy: int) -> bytes:
    return _bytes(file, int(index.offset[number, copy]), int(index.size[number, copy]), int(index.crc[number, copy]))


def _bytes(file: int, offset: int, size: int, crc: int) -> bytes:
    content = os.pread(file, size, offset)
    if len(content) != size:
        raise ValueError(f"the shard ends after {len(content)} of its {size} bytes: it is cut off")
    if crc >= 0 and zlib.crc32(content) != crc:
        raise ValueError("its bytes are not the ones that were written (checksum)")
    return content


def decode(content: bytes, manifest: Manifest, crop: Crop | None = None) -> np.ndarray:
    """A sample's values: pixels (channels, height, width) uint8, float32, or float16 moments (2 channels, h, w).

    Args:
        content: as it is stored.
        manifest: says what it is.
        crop: of an image of any format and size: how it becomes the size in the manifest. None: it must have that.

    Raises:
        ValueError: if it is not what the manifest says.
    """
    if manifest.values == "moments":
        channels, *size = manifest.shape
        shape = (2 * channels, *size)
        if len(content) != 2 * math.prod(shape):
            raise ValueError(f"it has {len(content)} bytes, {2 * math.prod(shape)} are due")
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
        raise ValueError(f"it has {len(values)} bytes of numbers, {dtype.itemsize * math.prod(shape)} are due")
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
