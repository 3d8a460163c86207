"""Real pictures to compare samples with: prepared shards, raw pictures, or the digits."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from shortcutflow.data.digits import load_digits
from shortcutflow.data.images import Crop, ImageError, read_image, to_square
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.reader import ShardReader
from shortcutflow.data.remote import is_url
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.readers import FolderReader

DIGITS = "digits"
"""The name of scikit-learn's digits as a source."""


class Pictures(Protocol):
    """Pictures in a fixed order.

    Attributes:
        name: for reports.
        count: how many there are.
    """

    name: str
    count: int

    def fingerprint(self) -> str:
        """Another one means other pictures."""

    def read(self, samples: range) -> Iterator[np.ndarray]:
        """Some of them, each (h, w, 3) uint8.

        Raises:
            ValueError: naming one that cannot be read.
        """


class DigitPictures:
    """The 1,797 digits, grey, 8x8; the pixels that their shards hold."""

    name, count = DIGITS, 1797

    def __init__(self) -> None:
        images = np.round((load_digits()[0][:, 0] + 1) * 127.5).astype(np.uint8)
        self._pixels = np.repeat(images[..., None], 3, axis=3)

    def fingerprint(self) -> str:
        """See :class:`Pictures`."""
        return hashlib.sha256(self._pixels.tobytes()).hexdigest()

    def read(self, samples: range) -> Iterator[np.ndarray]:
        """See :class:`Pictures`."""
        return iter(self._pixels[samples.start : samples.stop])


class ShardPictures:
    """Prepared shards of images, in the order in which they lie in them.

    Args:
        folder: of the shards, or its URL, or one that is open.
        cache: where shards of a URL are kept.

    Raises:
        ValueError: if they hold no images.
    """

    def __init__(self, folder: Path | str | ShardFolder, cache: Path = Path("data/cache")) -> None:
        self.name = str(folder)
        self._reader = ShardReader(folder if isinstance(folder, ShardFolder) else ShardFolder(folder, cache=cache))
        self._manifest: Manifest = self._reader.manifest
        if self._manifest.values != "uint8":
            held = "latents" if self._manifest.latents is not None else "numbers that are no images"
            raise ValueError(
                f"{folder} holds {held}: a reference is made of pictures; name those that they were made from"
            )
        self.count = self._manifest.samples
        self._ends = list(accumulate(shard.samples for shard in self._manifest.shards))

    def fingerprint(self) -> str:
        """See :class:`Pictures`."""
        return hashlib.sha256(self._manifest.model_dump_json().encode()).hexdigest()

    def read(self, samples: range) -> Iterator[np.ndarray]:
        """See :class:`Pictures`."""
        for i in samples:
            shard = bisect_right(self._ends, i)
            number = i - (self._ends[shard - 1] if shard else 0)
            pixels = np.moveaxis(self._reader.read(shard, number).data, 0, -1)
            yield np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


class RawPictures:
    """Pictures from anywhere (:mod:`shortcutflow.data.sources`), in the order of their names.

    Args:
        path: a folder or an archive.
        size: side of the square they are made to, in pixels; None leaves each as it is.
        crop: how, see :func:`shortcutflow.data.images.to_square`.
    """

    def __init__(self, path: Path, *, size: int | None = None, crop: Crop = "released") -> None:
        self._source = open_source(path, labels=False)
        self._size, self._crop = size, crop
        self.name = str(path) if size is None else f"{path}, crop {crop}, {size} pixels"
        self.count = len(self._source.items)

    def fingerprint(self) -> str:
        """See :class:`Pictures`; as the files were at the first call."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # A file is known by its name, size and time of change; reading it would cost as much as the reference.
        reader, digest = self._source.reader, hashlib.sha256()
        files = list(reader.files)
        if isinstance(reader, FolderReader):
            files = [reader.root / str(item.place[0]) for item in self._source.items]
        for file in files:
            digest.update(f"{file.name} {file.stat().st_mtime_ns}\n".encode())
        return f"{self._source.fingerprint()}/{digest.hexdigest()}/{self._size}/{self._crop if self._size else None}"

    def read(self, samples: range) -> Iterator[np.ndarray]:
        """See :class:`Pictures`."""
        for i in samples:
            item = self._source.items[i]
            try:
                image = read_image(self._source.read(item))
                yield np.asarray(image if self._size is None else to_square(image, self._size, self._crop))
            except ImageError as error:
                raise ValueError(f"picture {item.name} of {self.name}: {error}") from error


def open_pictures(
    source: str | Path | ShardFolder,
    *,
    size: int | None = None,
    crop: Crop = "released",
    cache: Path = Path("data/cache"),
) -> Pictures:
    """The pictures of a source: "digits", a folder or URL of shards, or raw pictures.

    Raises:
        FileNotFoundError, ValueError: if there are none, or size is given for pictures that are prepared already.
    """
    if isinstance(source, ShardFolder):
        return ShardPictures(source)
    prepared = str(source) == DIGITS or is_url(source) or (Path(source) / MANIFEST).is_file()
    if not prepared:
        return RawPictures(Path(source), size=size, crop=crop)
    if size is not None:
        raise ValueError(f"--size and --crop are for raw pictures; {source} is prepared already")
    return DigitPictures() if str(source) == DIGITS else ShardPictures(source, cache)


def save_pngs(pixels: np.ndarray, folder: Path, first: int) -> None:
    """Write images (n, h, w, 3) uint8 as ``00001234.png``, ..., numbered from ``first``."""
    from PIL import Image

    for i, picture in enumerate(pixels, start=first):
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")
        png_path(folder, i).write_bytes(out.getvalue())


def png_path(folder: Path, sample: int) -> Path:
    """The file of a sample."""
    return folder / f"{sample:08d}.png"
