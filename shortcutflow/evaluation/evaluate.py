"""The quality of a network's samples by named protocols: from weights to one report of all numbers of steps.

Several processes (``torchrun``) share the samples; their features' moments are all-reduced, and what single features
are needed for is gathered. Sample i depends on (seed, i), so the numbers do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import shortcutflow
from shortcutflow.data.source import DataSettings
from shortcutflow.distributed import World
from shortcutflow.evaluation.distances.inception_score import require_scores
from shortcutflow.evaluation.feature_set import checkpoint_file, extract_all, remove_checkpoint, timed
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.metrics import WITH_FEATURES, WITH_REFERENCE, check_request, compute_metrics
from shortcutflow.evaluation.real_images import DIGITS, RealImages, open_images
from shortcutflow.evaluation.reference import CLEAN_FID, Reference, clean_fid_reference, load_reference, reference_of
from shortcutflow.evaluation.report import report_of, write_report
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.io.atomic import claim, require_place

OF_LATENTS = (
    "{name} was trained on latents, and a reference is made of images: name those that they were made from, or their "
    "statistics, with --reference or evaluation.reference"
)


def evaluate(
    sampler: Sampler,
    protocol: EvaluationProtocol,
    out: Path,
    *,
    steps: Sequence[int],
    metrics: Sequence[str] = ("fid",),
    samples: int = 50_000,
    reference: str | Path | None = None,
    images: Path | None = None,
    keep_features: bool = False,
    world: World | None = None,
) -> dict[str, Any] | None:
    """Measure samples at every number of steps and write the report; every rank must call this.

    The same call with the same number of processes resumes a stopped one.

    Args:
        sampler: of what is evaluated.
        protocol: by which.
        out: the report's file.
        steps: numbers of steps.
        metrics: names, see :data:`shortcutflow.evaluation.metrics.METRICS`.
        samples: how many for each number of steps.
        reference: an .npz file of statistics, images (shards, a folder, an archive, "digits"), or clean-fid's own
            statistics as "clean-fid:cifar10-train"; None takes the images that the network was trained on.
        images: a folder to save the samples in, a folder for each number of steps below it, or None.
        keep_features: leave the features for further metrics of the same samples.
        world: the processes that share the work; None is this one.

    Returns:
        The report, on rank 0; None on the others.

    Raises:
        ValueError, OSError, ImportError: for anything that is wrong or missing, before any sample is made, and for
            samples that are not finite.
    """
    world = world or World(0, 1, sampler.model.device)
    check_request(steps, metrics, samples)
    require_place(out, ".json")
    seen = check_extractor(sampler.side, sampler.model.num_classes, protocol, metrics)
    width = seen.features.shape[1]
    seconds: dict[str, float] = {}
    with timed(seconds, "whole"):
        with timed(seconds, "reference"):
            real = _reference(sampler, protocol, reference, metrics, out.parent, world)
        if real is not None and len(real.statistics.mu) != width:
            raise ValueError(
                f"the reference {real.record.source} has {len(real.statistics.mu)} features, protocol "
                f"{protocol.name} has {width}: it was made by another protocol"
            )
        if images is not None:
            claim(images)
        files, rows = [], []
        for count in steps:
            key = sampler.key(count) | {
                "samples": samples, "batch_size": sampler.batch_size, "protocol": protocol.name,
                "extractor": protocol.extractor.name, "version": shortcutflow.__version__,
            }  # fmt: skip
            files.append(checkpoint_file(out.parent, f"steps-{count}", key, world))
            folder = None if images is None else images / f"steps-{count}"
            if folder is not None:
                folder.mkdir(exist_ok=True)
            found = extract_all(
                partial(sampler.extract, count, protocol, folder),
                samples, batch_size=sampler.batch_size, file=files[-1], world=world,
                keep=samples if keep_features or not WITH_FEATURES.isdisjoint(metrics) else 0,
                keep_logits=seen.logits is not None and (keep_features or "is" in metrics),
                folder=folder,
            )  # fmt: skip
            if world.is_main:
                with timed(found.seconds, "distances"):
                    values = compute_metrics(metrics, found, real, sampler.model.device)
                rows.append({"steps": count, "values": values, "seconds": found.seconds})
    report = None
    if world.is_main:
        report = report_of(sampler, protocol, real, rows, samples=samples, processes=world.size, seconds=seconds)
        write_report(report, out)
    world.wait_for_all()
    for file in [] if keep_features else files:
        remove_checkpoint(file)
    return report


def check_extractor(
    side: tuple[int, int], num_classes: int | None, protocol: EvaluationProtocol, metrics: Sequence[str]
) -> Extracted:
    """What the extractor finds in one image of noise of the samples' size.

    Raises:
        ValueError: if a metric needs logits or a classifier and the protocol has none, or the extractor does not take
            such images.
    """
    noise = np.random.default_rng(0).integers(0, 256, (1, *side, 3), dtype=np.uint8)
    seen = protocol.extractor(noise)
    if "is" in metrics:
        if seen.logits is None:
            raise ValueError(f"metric 'is' needs class scores, which protocol {protocol.name} does not give")
        require_scores(seen.logits)
    if "label_accuracy" in metrics and (protocol.classifier is None or num_classes is None):
        lacks = f"a classifier, which protocol {protocol.name} does not have" if num_classes else "samples with labels"
        raise ValueError(f"metric 'label_accuracy' needs {lacks}")
    return seen


def _reference(
    sampler: Sampler,
    protocol: EvaluationProtocol,
    source: str | Path | None,
    metrics: Sequence[str],
    folder: Path,
    world: World,
) -> Reference | None:
    """What to compare with; made of images if need be, and kept beside the report."""
    if WITH_REFERENCE.isdisjoint(metrics):
        return None
    found = training_images(sampler) if source is None else open_reference(source, protocol, metrics, sampler.side)
    if isinstance(found, Reference):
        return found
    with_features = not WITH_FEATURES.isdisjoint(metrics)
    return reference_of(found, protocol, folder, with_features=with_features, world=world, side=sampler.side)


def open_reference(
    source: str | Path, protocol: EvaluationProtocol, metrics: Sequence[str], side: tuple[int, int]
) -> Reference | RealImages:
    """Statistics, or the images to make them of; side is that of the samples."""
    with_features = not WITH_FEATURES.isdisjoint(metrics)
    if str(source).startswith(CLEAN_FID):
        if with_features:
            raise ValueError(f"{source} has mean and covariance alone, with which 'fid' is the only metric")
        return clean_fid_reference(str(source).removeprefix(CLEAN_FID), protocol, side)
    if Path(source).suffix == ".npz":
        return load_reference(Path(source), protocol, with_features=with_features)
    return open_images(source)


def training_images(sampler: Sampler) -> RealImages:
    """The images that a network was trained on.

    Raises:
        ValueError: if they are not known, or were never kept, as with latents.
    """
    data, name = sampler.model.data, sampler.model.name
    if data is None:
        raise ValueError(f"nothing says what {name} was trained on: name images or their statistics with --reference")
    if sampler.autoencoder is not None:
        raise ValueError(OF_LATENTS.format(name=name))
    if not isinstance(data, DataSettings):
        raise ValueError(
            f"{name} was trained on data of kind {data.kind!r}, which is a stream and no folder of shards: name "
            "images or their statistics with --reference"
        )
    return open_images(DIGITS if data.kind == "digits" else data.opened())
