"""What ``--smoke`` makes of a run: a few steps of a tiny network, with random data and models for those not there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcutflow.config import CONFIG_FILE, CURRENT, RunConfig, check_rows
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.manifest import MANIFEST, LatentsInfo, Manifest
from shortcutflow.data.remote import is_url
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import READING, DataSource, ShardsData
from shortcutflow.distributed import Rank
from shortcutflow.io.atomic import build_once
from shortcutflow.models.config import config_of_run
from shortcutflow.models.model import Model
from shortcutflow.seeds import generator_for

SAMPLES_PER_SHARD, SHARDS = 16, 2
LATENT_SHAPE = (4, 32, 32)
"""Of 256x256 pixels in the paper's autoencoder."""
LATENT_CLASSES, IMAGE_CLASSES = 1000, 10
LATENTS = LatentsInfo(vae="stand-in/for/an autoencoder", sha256="0" * 64, scaling_factor=0.18215, mirrored=True)
"""The autoencoder is neither a folder nor a hub id: sample grids show the latents themselves."""


def smoke(config: RunConfig) -> RunConfig:
    """The same run with 4 steps of about 8 samples, a tiny network and hardly any evaluation, on a CPU."""
    small = {
        "steps": 4, "global_batch_size": _smoke_batch(config), "accumulation": 1, "log_every": 1, "grid_steps": (1, 4),
        "device": "cpu", "precision": "float32", "compile": False, "shard_group": None,
    }  # fmt: skip
    update = {
        "training": config.training.model_copy(update=small),
        "backbone": config.backbone.smoke(),
        "coupling": config.coupling and config.coupling.model_copy(update={"pool": 16}),
        "evaluation": config.evaluation.smoke() if config.evaluation is not None else None,
    }
    return config.model_copy(update=update)


def _smoke_batch(config: RunConfig) -> int:
    """At most 8 samples, unless the processes would not get equally many of them, or too few of some kind."""
    world = Rank.from_environment().world_size
    smallest = math.ceil(min(8, config.training.global_batch_size) / world) * world
    for batch in range(smallest, config.training.global_batch_size, world):
        with suppress(ValueError):
            check_rows(config.objective, batch, world)
            return batch
    return max(smallest, config.training.global_batch_size)


def with_stand_ins(config: RunConfig) -> RunConfig:
    """The same run, with random data and models in the place of those that are not there, written below ``data/``."""
    return _with_models(_with_data(config))


def _with_data(config: RunConfig) -> RunConfig:
    """The same run, with stand-in data if its own is not there."""
    labelled = config.objective.condition_dropout > 0 or getattr(config.objective, "guidance_scale", 1) != 1
    fake = fake_data_for(config.data, labelled=labelled)
    if fake is None:
        return config
    if Rank.from_environment().is_main:
        print(fake[1], flush=True)
    return config.model_copy(update={"data": fake[0]})


def _with_models(config: RunConfig) -> RunConfig:
    """The same run, which begins with a random model of its own small size in place of trained ones."""
    trained = {use: path for use in ("start", "teacher") if (path := getattr(config, use)) is not None}
    if not trained:
        return config
    folder = fake_model(config)
    if Rank.from_environment().is_main:
        uses, instead_of = " and ".join(trained), ", ".join(sorted({str(path) for path in trained.values()}))
        print(f"stand-in {uses}: random weights in {folder}, not {instead_of}", flush=True)
    return config.model_copy(update=dict.fromkeys(trained, str(folder)))


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


@torch.no_grad()
def fake_model(config: RunConfig) -> Path:
    """The folder of a flow model with the run's network and random weights, below ``data/``, written if need be."""
    of_run = config_of_run(config, config.data.describe(), weights=CURRENT, step=None)
    about = {"weights": "random numbers, to try a recipe with"}
    described = of_run.model_copy(update={"flow_only": True, "sampler": "euler", "about": about})
    digest = hashlib.sha256(described.model_dump_json().encode()).hexdigest()[:12]
    network, generator = config.build_network(), generator_for(0, "stand-in model")
    for parameter in network.parameters():  # as it starts, it returns zero for any input
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)

    def write(folder: Path) -> None:
        Model(network, described, CURRENT, folder).save(folder)

    return build_once(Path("data") / f"smoke-model-{digest}", write, marker=CONFIG_FILE)
