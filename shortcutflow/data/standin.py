"""Stand-in data: random numbers in the place of data that is not there, so that a recipe can be tried from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shortcutflow.data.digits import DigitsData
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.manifest import MANIFEST, LatentsInfo, Manifest
from shortcutflow.data.pusht import PushTData
from shortcutflow.data.remote import is_url
from shortcutflow.data.shards import EncodedBatch, Sample, shard_name, write_shard, write_shards
from shortcutflow.data.source import DataSettings, ShardsData
from shortcutflow.data.webdataset import WebdatasetData
from shortcutflow.io.atomic import build_once

SAMPLES_PER_SHARD, SHARDS = 16, 2
LATENT_SHAPE = (4, 32, 32)
"""Of 256x256 pixels in the paper's autoencoder."""
LATENT_CLASSES, IMAGE_CLASSES = 1000, 10
LATENTS = LatentsInfo(vae="stand-in/for/an autoencoder", sha256="0" * 64, scaling_factor=0.18215, mirrored=True)
"""The autoencoder is neither a folder nor a hub id: sample grids show the latents themselves."""

AnyData = DigitsData | ImageFolderData | PushTData | ShardsData | WebdatasetData


class StandIn(NamedTuple):
    """Stand-in shards, and a sentence that says what is in whose place."""

    data: ShardsData
    said: str


def stand_in_for(data: AnyData, *, labelled: bool) -> StandIn | None:
    """What takes the place of data that is not there, below ``data/``, written if need be; None if nothing has to.

    Shards of latents are replaced by random moments, of 256x256 pixels; raw pictures by random ones of their size. What
    another folder that is not there should hold cannot be known: nothing takes its place. Several processes may ask at
    once.

    Args:
        data: of a recipe.
        labelled: whether stand-in latents have labels; raw pictures have them as ``data.labels`` says.
    """
    if isinstance(data, ImageFolderData) and not _has_pictures(data):
        size, classes = data.size, IMAGE_CLASSES if data.labels else None
        folder = build_once(
            _folder_for(data.shards, classes), lambda place: write_images(place, size, classes), marker=MANIFEST
        )
        instead = ShardsData(folder=folder, **data.model_dump(include=set(DataSettings.model_fields)))
        return StandIn(instead, f"stand-in data: random pictures in {folder}, because {data.path} is not there")
    if isinstance(data, ShardsData) and data.vae is not None and _is_missing(data.folder):
        classes = LATENT_CLASSES if labelled else None
        folder = build_once(
            _folder_for(Path(data.folder), classes), lambda place: write_latents(place, classes), marker=MANIFEST
        )
        instead = data.model_copy(update={"folder": folder, "vae": None})
        return StandIn(instead, f"stand-in data: random latents in {folder}, because {data.folder} is not there")
    return None


def _has_pictures(data: ImageFolderData) -> bool:
    # A path may lead into an archive.
    path = Path(data.path)
    raw = is_url(data.path) or path.exists() or any(place.is_file() for place in path.parents)
    return raw or (data.shards / MANIFEST).is_file()


def _is_missing(folder: Path | str) -> bool:
    # A URL is a string, and is asked when it is read.
    return isinstance(folder, Path) and not (folder / MANIFEST).is_file()


def _folder_for(folder: Path, classes: int | None) -> Path:
    return Path("data") / f"smoke-{folder.name}{'-labelled' if classes else ''}"


def write_latents(folder: Path, num_classes: int | None) -> Manifest:
    """Shards of random moments, with those of mirror images, as ``shortcutflow prepare --latents`` writes them."""
    random = np.random.default_rng(0)
    channels, *sizes = LATENT_SHAPE
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(SHARDS):
        means = random.standard_normal((SAMPLES_PER_SHARD, 1, channels, *sizes)) * 5
        moments = np.concatenate([means, np.full_like(means, -5)], axis=2)
        names = tuple(f"random-{number}-{i}" for i in range(SAMPLES_PER_SHARD))
        labels = tuple(random.integers(num_classes, size=SAMPLES_PER_SHARD).tolist()) if num_classes else None
        pack = EncodedBatch("random", np.concatenate([moments, moments[..., ::-1]], axis=1), labels, names)
        entry = write_shard(folder / shard_name(number), [pack]).entry
        assert entry is not None
        entries.append(entry)
    manifest = Manifest(
        shape=LATENT_SHAPE, values="moments", format="npy", latents=LATENTS, num_classes=num_classes,
        preprocessing="none: random latents, to try a recipe with", shards=tuple(entries),
    )  # fmt: skip
    manifest.write(folder)
    return manifest


def write_images(folder: Path, size: int, num_classes: int | None) -> Manifest:
    """Shards of random pictures (3, size, size)."""
    random = np.random.default_rng(0)

    def samples() -> Iterator[Sample]:
        for i in range(SHARDS * SAMPLES_PER_SHARD):
            label = i % num_classes if num_classes else None
            yield Sample(random.integers(0, 256, (3, size, size), dtype=np.uint8), label, f"random-{i}")

    return write_shards(
        samples(), folder, samples_per_shard=SAMPLES_PER_SHARD, num_classes=num_classes,
        preprocessing="none: random pictures, to try a recipe with",
    )  # fmt: skip
