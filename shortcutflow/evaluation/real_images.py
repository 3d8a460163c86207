"""Real images to compare samples with: prepared shards, raw images, or the digits."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from shortcutflow.data.digits import load_digits
from shortcutflow.data.images import Crop, ImageError, read_image, to_square
from shortcutflow.data.manifest import MANIFEST
from shortcutflow.data.remote import is_url
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.readers import FolderReader

DIGITS = "digits"
"""The name of scikit-learn's digits as a source."""


@dataclass(frozen=True)
class RealImages:
    """Images in a fixed order.

    Attributes:
        name: for reports.
        count: how many there are.
        fingerprint: returns text that is another one for other images.
        read: some of them by index, each (h, w, 3) uint8; a ValueError names one that cannot be read.
    """

    name: str
    count: int
    fingerprint: Callable[[], str]
    read: Callable[[range], Iterator[np.ndarray]]


def digit_images() -> RealImages:
    """The 1,797 digits, grey, 8x8; the pixels that their shards hold."""
    images = np.round((load_digits()[0][:, 0] + 1) * 127.5).astype(np.uint8)
    pixels = np.repeat(images[..., None], 3, axis=3)
    return RealImages(
        DIGITS, len(pixels), hashlib.sha256(pixels.tobytes()).hexdigest,
        lambda index: iter(pixels[index.start : index.stop]),
    )  # fmt: skip


def shard_images(folder: Path | str | ShardFolder, cache: Path = Path("data/cache")) -> RealImages:
    """Prepared shards of images, in their order, those of a URL kept in ``cache``; ValueError if they hold none."""
    shards = folder if isinstance(folder, ShardFolder) else ShardFolder(folder, cache=cache)
    manifest = shards.manifest
    if manifest.values != "uint8":
        held = "latents" if manifest.latents is not None else "numbers that are no images"
        raise ValueError(f"{folder} holds {held}: a reference is made of images; name those that they were made from")
    ends = list(accumulate(shard.samples for shard in manifest.shards))

    def read(index: range) -> Iterator[np.ndarray]:
        for i in index:
            shard = bisect_right(ends, i)
            pixels = np.moveaxis(shards.read(shard, i - (ends[shard - 1] if shard else 0)).data, 0, -1)
            yield np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels

    fingerprint = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest
    return RealImages(str(folder), manifest.samples, fingerprint, read)


def raw_images(path: Path, *, size: int | None = None, crop: Crop = "released") -> RealImages:
    """Images of a folder or archive (:mod:`shortcutflow.data.sources`), in the order of their names.

    They are made squares of ``size`` pixels by :func:`shortcutflow.data.images.to_square`; None leaves each as it is.
    """
    source = open_source(path, labels=False)
    name = str(path) if size is None else f"{path}, crop {crop}, {size} pixels"

    @cache
    def fingerprint() -> str:
        # A file is known by its name, size and time of change, at the first call; reading all would cost as much as
        # the reference.
        reader, digest = source.reader, hashlib.sha256()
        files = list(reader.files)
        if isinstance(reader, FolderReader):
            files = [reader.root / str(item.place[0]) for item in source.items]
        for file in files:
            digest.update(f"{file.name} {file.stat().st_mtime_ns}\n".encode())
        return f"{source.fingerprint()}/{digest.hexdigest()}/{size}/{crop if size else None}"

    def read(index: range) -> Iterator[np.ndarray]:
        for i in index:
            item = source.items[i]
            try:
                image = read_image(source.read(item))
                yield np.asarray(image if size is None else to_square(image, size, crop))
            except ImageError as error:
                raise ValueError(f"image {item.name} of {name}: {error}") from error

    return RealImages(name, len(source.items), fingerprint, read)


def open_images(
    source: str | Path | ShardFolder,
    *,
    size: int | None = None,
    crop: Crop = "released",
    cache: Path = Path("data/cache"),
) -> RealImages:
    """The images of a source: "digits", a folder or URL of shards, or raw images.

    Raises:
        FileNotFoundError, ValueError: if there are none, or size is given for images that are prepared already.
    """
    if isinstance(source, ShardFolder):
        return shard_images(source)
    is_prepared = str(source) == DIGITS or is_url(source) or (Path(source) / MANIFEST).is_file()
    if not is_prepared:
        return raw_images(Path(source), size=size, crop=crop)
    if size is not None:
        raise ValueError(f"--size and --crop are for raw images; {source} is prepared already")
    return digit_images() if str(source) == DIGITS else shard_images(source, cache)


def save_pngs(pixels: np.ndarray, folder: Path, first: int) -> None:
    """Write images (n, h, w, 3) uint8 as ``00001234.png``, ..., numbered from ``first``."""
    from PIL import Image

    for i, image in enumerate(pixels, start=first):
        Image.fromarray(image).save(png_path(folder, i))


def png_path(folder: Path, index: int) -> Path:
    """The file of a sample."""
    return folder / f"{index:08d}.png"
