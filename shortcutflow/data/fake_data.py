"""Random numbers in place of data that is not there, so that every recipe can be tried at once (``--smoke``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
    if isinstance(data, ImageFolderData):
        path = Path(data.path)  # which may lead into an archive
        is_there = is_url(data.path) or path.exists() or any(place.is_file() for place in path.parents)
        what, missing, shards = "images", path, data.shards
        classes = IMAGE_CLASSES if data.labels else None
        write: Callable[[Path], Manifest] = partial(write_images, size=data.size, num_classes=classes)
    elif isinstance(data, ShardsData) and data.vae is not None and not is_url(data.folder):
        is_there, what, missing, shards = False, "latents", Path(data.folder), Path(data.folder)
        classes = LATENT_CLASSES if labelled else None
        write = partial(write_latents, num_classes=classes)
    else:
        return None
    if is_there or (shards / MANIFEST).is_file():
        return None
    place = Path("data") / f"smoke-{shards.name}{'-labelled' if classes else ''}"
    build_once(place, write, marker=MANIFEST)
    fake = ShardsData(folder=place, **data.model_dump(include=READING))
    return fake, f"stand-in data: random {what} in {place}, because {missing} is not there"


def write_latents(folder: Path, num_classes: int | None) -> Manifest:
    """Shards of random moments, with those of mirror images, as ``shortcutflow prepare --latents`` writes them."""

    def moments(random: np.random.Generator) -> np.ndarray:
        mean = (random.standard_normal(LATENT_SHAPE) * 5).astype(np.float16)
        moments = np.concatenate([mean, np.full_like(mean, -5)])
        return np.stack([moments, moments[..., ::-1]])

    return _write(folder, moments, num_classes, latents=LATENTS)


def write_images(folder: Path, size: int, num_classes: int | None) -> Manifest:
    """Shards of random images (3, size, size)."""
    return _write(folder, lambda random: random.integers(0, 256, (3, size, size), dtype=np.uint8), num_classes)


def _write(
    folder: Path, draw: Callable[[np.random.Generator], np.ndarray], num_classes: int | None, **options: Any
) -> Manifest:
    random = np.random.default_rng(0)
    count = SHARDS * SAMPLES_PER_SHARD
    labels = [i * num_classes // count if num_classes else None for i in range(count)]
    samples = (Sample(draw(random), label, f"random-{i}") for i, label in enumerate(labels))
    words = "none: random numbers, to try a recipe with"
    return write_shards(
        samples, folder, samples_per_shard=SAMPLES_PER_SHARD, num_classes=num_classes, preprocessing=words, **options
    )
