"""Random numbers in place of data that is not there, so that every recipe can be tried at once (``--smoke``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.manifest import MANIFEST, LatentsInfo, Manifest
from shortcutflow.data.remote import is_url
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import READING, DataSource, ShardsData
from shortcutflow.io.atomic import build_once

SAMPLES_PER_SHARD, SHARDS = 16, 2
LATENT_SHAPE = (4, 32, 32)
"""Of 256x256 pixels in the paper's autoencoder."""
LATENT_CLASSES, IMAGE_CLASSES = 1000, 10
LATENTS = LatentsInfo(vae="stand-in/for/an autoencoder", sha256="0" * 64, scaling_factor=0.18215, mirrored=True)
"""The autoencoder is neither a folder nor a hub id: sample grids show the latents themselves."""


def fake_data_for(data: DataSource, *, labelled: bool) -> tuple[ShardsData, str] | None:
    """Shards to use where a recipe's data is not there, written below ``data/`` if need be, and a sentence about them.

    Shards of latents are replaced by random moments, of 256x256 pixels; raw images by random ones of their size. What
    other folders should hold cannot be known: None, as for data that is there. Several processes may call at once.

    Args:
        data: of a recipe.
        labelled: whether fake latents have labels; raw images have them as ``data.labels`` says.
    """
    if isinstance(data, ImageFolderData) and not _is_there(data):
        classes = IMAGE_CLASSES if data.labels else None
        size, place = data.size, _folder_for(data.shards, classes)
        build_once(place, lambda folder: write_images(folder, size, classes), marker=MANIFEST)
        fake = ShardsData(folder=place, **data.model_dump(include=READING))
        return fake, f"stand-in data: random images in {place}, because {data.path} is not there"
    if isinstance(data, ShardsData) and data.vae is not None and not is_url(data.folder):
        if (Path(data.folder) / MANIFEST).is_file():
            return None
        classes = LATENT_CLASSES if labelled else None
        place = _folder_for(Path(data.folder), classes)
        build_once(place, lambda folder: write_latents(folder, classes), marker=MANIFEST)
        fake = data.model_copy(update={"folder": place, "vae": None})
        return fake, f"stand-in data: random latents in {place}, because {data.folder} is not there"
    return None


def _is_there(data: ImageFolderData) -> bool:
    path = Path(data.path)  # which may lead into an archive
    raw = is_url(data.path) or path.exists() or any(place.is_file() for place in path.parents)
    return raw or (data.shards / MANIFEST).is_file()


def _folder_for(folder: Path, classes: int | None) -> Path:
    return Path("data") / f"smoke-{folder.name}{'-labelled' if classes else ''}"


def write_latents(folder: Path, num_classes: int | None) -> Manifest:
    """Shards of random moments, with those of mirror images, as ``shortcutflow prepare --latents`` writes them."""
    random = np.random.default_rng(0)
    channels, *sizes = LATENT_SHAPE

    def samples() -> Iterator[Sample]:
        for i in range(SHARDS * SAMPLES_PER_SHARD):
            mean = (random.standard_normal((channels, *sizes)) * 5).astype(np.float16)
            moments = np.concatenate([mean, np.full_like(mean, -5)])
            label = int(random.integers(num_classes)) if num_classes else None
            yield Sample(np.stack([moments, moments[..., ::-1]]), label, f"random-{i}")

    return write_shards(
        samples(), folder, samples_per_shard=SAMPLES_PER_SHARD, num_classes=num_classes, latents=LATENTS,
        preprocessing="none: random latents, to try a recipe with",
    )  # fmt: skip


def write_images(folder: Path, size: int, num_classes: int | None) -> Manifest:
    """Shards of random images (3, size, size)."""
    random = np.random.default_rng(0)

    def samples() -> Iterator[Sample]:
        for i in range(SHARDS * SAMPLES_PER_SHARD):
            label = i % num_classes if num_classes else None
            yield Sample(random.integers(0, 256, (3, size, size), dtype=np.uint8), label, f"random-{i}")

    return write_shards(
        samples(), folder, samples_per_shard=SAMPLES_PER_SHARD, num_classes=num_classes,
        preprocessing="none: random images, to try a recipe with",
    )  # fmt: skip
