"""Encoding the pictures of a shard: decoded ahead in worker processes, encoded in batches, gathered into members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shortcutflow.data.autoencoder import Autoencoder
from shortcutflow.data.images import Crop, ImageError, read_image, to_square
from shortcutflow.data.shards import EncodedBatch, Skipped
from shortcutflow.data.sources.labels import LabelChoice
from shortcutflow.data.sources.readers import RawItem, RawSource


class LatentOptions(BaseModel):
    """What decides about the content of the shards; ``batch_size`` too, since it may change the last bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1, le=4096, description="side of the pictures in pixels")
    crop: Crop = "released"
    labels: LabelChoice = Field(default=True, description="true: those that are there; false: none; or which")
    seed: int = Field(default=0, description="of the one shuffling before the cut into shards")
    samples_per_shard: int = Field(default=4096, ge=1)
    samples_per_member: int = Field(default=64, ge=1)
    batch_size: int = Field(default=32, ge=1, description="pictures encoded at once")
    mirror: bool = Field(default=True, description="keep the moments of the mirror image too")
    vae_sha256: str = Field(description="of the autoencoder's weights, wherever they lie")


class Row(NamedTuple):
    """One sample: its moments (copies, 2 channels, h, w) float16, its label and its name."""

    moments: np.ndarray
    label: int | None
    name: str


class Decoded(NamedTuple):
    """Some items of a source.

    Attributes:
        pixels: (b, 3, size, size) uint8 of those that could be used.
        items: those.
        skipped: the others.
        error: what ended the reading, since an exception in a worker process would come with that one's traceback.
    """

    pixels: Tensor
    items: list[RawItem]
    skipped: list[Skipped]
    error: OSError | None = None


class _Pictures(Dataset[Decoded]):
    """Batches of items, decoded; a worker process has its own handle of the source."""

    def __init__(self, source: RawSource, batches: list[list[RawItem]], size: int, crop: Crop) -> None:
        self._source, self._batches, self._size, self._crop = source, batches, size, crop

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Decoded:
        pixels, items, skipped = [np.zeros((0, 3, self._size, self._size), np.uint8)], [], []
        for item in self._batches[number]:
            try:
                square = to_square(read_image(self._source.read(item)), self._size, self._crop)
            except ImageError as error:
                skipped.append(Skipped(item.name, str(error)))
                continue
            except OSError as error:
                return Decoded(torch.empty(0), [], [], error)
            pixels.append(np.moveaxis(np.asarray(square), -1, 0)[None])
            items.append(item)
        return Decoded(torch.from_numpy(np.concatenate(pixels)), items, skipped)


def decoded(source: RawSource, batches: list[list[RawItem]], options: LatentOptions, workers: int) -> Iterator[Decoded]:
    """The batches in order, decoded ahead by worker processes; by this one if there are none."""
    loader = DataLoader(
        _Pictures(source, batches, options.size, options.crop),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        # Not used for anything; without one the loader would draw from the global generator.
        generator=torch.Generator(),
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def encode_pictures(autoencoder: Autoencoder, pixels: Tensor, names: Sequence[str], *, mirror: bool) -> np.ndarray:
    """Moments (b, copies, 2 channels, h, w) float16 of pictures (b, 3, size, size) uint8; copy 1 is the mirror image.

    Raises:
        ValueError: naming the picture, if a number does not fit float16.
    """
    images = pixels.to(autoencoder.device).float() / 127.5 - 1
    copies = [images, images.flip(-1)] if mirror else [images]
    exact = torch.stack([autoencoder.encode(copy) for copy in copies], dim=1)
    moments = exact.half()
    fits = moments.isfinite().flatten(1).all(dim=1).tolist()
    if not all(fits):
        first = fits.index(False)
        raise ValueError(
            f"the latent of {names[first]} reaches {exact[first].abs().max().item():.3g}, outside the range of float16 "
            f"(65504): autoencoder {autoencoder.name} does not fit this picture"
        )
    return moments.cpu().numpy()


def rows(
    batches: Iterable[Decoded],
    autoencoder: Autoencoder,
    options: LatentOptions,
    strict: bool,
    advance: Callable[[int], object],
) -> Iterator[Row | Skipped]:
    """Encode decoded pictures, one row each."""
    for batch in batches:
        if batch.error is not None:
            raise batch.error
        if strict:
            refuse(batch.skipped)
        yield from batch.skipped
        if batch.items:
            moments = encode_pictures(
                autoencoder, batch.pixels, [item.name for item in batch.items], mirror=options.mirror
            )
            for item, row in zip(batch.items, moments, strict=True):
                yield Row(row, item.label if options.labels else None, item.name)
        advance(len(batch.items) + len(batch.skipped))


def refuse(skipped: Sequence[Skipped]) -> None:
    """Raise ValueError for the first of them, under ``strict``."""
    for name, reason in skipped:
        raise ValueError(f"{name}: {reason}")


def packs(encoded: Iterable[Row | Skipped], shard: int, samples_per_member: int) -> Iterator[EncodedBatch | Skipped]:
    """Rows gathered into members."""
    waiting: list[Row] = []
    members = 0
    for row in encoded:
        if isinstance(row, Skipped):
            yield row
            continue
        waiting.append(row)
        if len(waiting) == samples_per_member:
            yield _pack(waiting, f"{shard:06d}-{members:04d}")
            waiting, members = [], members + 1
    if waiting:
        yield _pack(waiting, f"{shard:06d}-{members:04d}")


def _pack(samples: list[Row], key: str) -> EncodedBatch:
    labels = tuple(sample.label for sample in samples if sample.label is not None)
    moments = np.stack([sample.moments for sample in samples])
    return EncodedBatch(key, moments, labels or None, tuple(sample.name for sample in samples))
