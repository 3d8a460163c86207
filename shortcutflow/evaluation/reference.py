"""What samples are compared with: statistics of real images, and their features where a metric needs them.

::

    NAME.npz           mean and covariance of the features, in the authors' layout
    NAME.json          which images, which protocol, how many; and the hash of the statistics it belongs to
    NAME.safetensors   features of at most 50,000 of the images, if they were wanted
"""

from __future__ import annotations

import re
import zipfile
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import save

import shortcutflow
from shortcutflow.distributed import World
from shortcutflow.evaluation.distances.statistics import (
    Statistics,
    load_statistics,
    require_statistics,
    save_statistics,
    statistics_hash,
)
from shortcutflow.evaluation.feature_set import checkpoint_file, extract_all, hash_of, remove_checkpoint, timed
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.real_images import RealImages
from shortcutflow.io.atomic import require_absent, require_ours, write_whole
from shortcutflow.io.json import read_object, wrong_fields
from shortcutflow.io.safetensors import opened

MOST_FEATURES = 50_000
"""Images whose features are kept, for metrics that compare single images."""
CLEAN_FID = "clean-fid:"
"""Begins the names of clean-fid's own statistics."""


class ReferenceRecord(BaseModel):
    """What is known of a reference, as its JSON file and reports say it; null is what nobody wrote down.

    Args:
        source: which images.
        protocol, extractor: names of what made the features.
        images, features: how many images there are, and of how many the features are kept.
        statistics_sha256: of mean and covariance.
        fingerprint: of the images.
        version: of this library.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    protocol: str | None = None
    extractor: str | None = None
    images: int | None = None
    statistics_sha256: str
    features: int = 0
    fingerprint: str | None = None
    version: str | None = None


class Reference(NamedTuple):
    """A reference, ready to compare with.

    Attributes:
        statistics: mean and covariance of the features.
        features: (n, k) float32 of at most ``MOST_FEATURES`` images, or None.
        record: what is known of it.
        file: of its statistics.
        reused: whether an earlier evaluation had made it of the same images.
    """

    statistics: Statistics
    features: np.ndarray | None
    record: ReferenceRecord
    file: str
    reused: bool = False


def reference_of(
    images: RealImages,
    protocol: EvaluationProtocol,
    folder: Path,
    *,
    with_features: bool,
    world: World,
    side: tuple[int, int] | None = None,
) -> Reference:
    """The reference of real images, kept in ``folder``; made if it is not there. Every rank must call this.

    Another name, size or time of change of an image makes a new one. Arguments and errors: :func:`make_reference`.
    """
    digest = hash_of({"pictures": images.fingerprint(), "extractor": protocol.extractor.name})
    path, reused = folder / f"reference-{file_name(protocol.name)}-{digest}.npz", False
    # Rank 0 alone decides: ranks that disagreed would wait for each other in different places.
    if world.is_main:
        with suppress(OSError, ValueError):  # absent, damaged, or without features
            load_reference(path, protocol, with_features=with_features)
            reused = True
    if not (reused := world.gather(reused)[0]):
        make_reference(images, protocol, path, with_features=with_features, world=world, side=side)
    return load_reference(path, protocol, with_features=with_features)._replace(reused=reused)


def make_reference(
    images: RealImages,
    protocol: EvaluationProtocol,
    path: Path,
    *,
    with_features: bool,
    world: World,
    batch_size: int = 100,
    side: tuple[int, int] | None = None,
) -> None:
    """Extract the features of real images and write the reference; every rank must call this.

    The same call resumes a stopped one.

    Args:
        path: the .npz file; the others lie beside it.
        side: (height, width) that images must have, in pixels; None takes any.

    Raises:
        ValueError: for images that cannot be read or have another size, naming them.
        FileExistsError: if another program's files are there.
    """
    if images.count < 2:
        raise ValueError(f"a reference needs at least 2 images, {images.name} holds {images.count}")
    record_file, features_file = path.with_suffix(".json"), path.with_suffix(".safetensors")
    for file in (record_file, features_file):
        require_ours(file, b"statistics_sha256")
    if not record_file.is_file():  # which says that the others are ours
        require_absent(path)

    def extract(index: range, seconds: dict[str, float]) -> tuple[Extracted, int]:
        # Images of the same size together, in their order.
        batches = [np.stack(list(same)) for _, same in groupby(images.read(index), key=np.shape)]
        for batch in batches:
            if side is not None and batch.shape[1:3] != side:
                raise ValueError(
                    f"{images.name} holds an image of {batch.shape[2]}x{batch.shape[1]} pixels, the samples have "
                    f"{side[1]}x{side[0]}: make a reference of the same size with --make-stats --size {side[0]}"
                )
        with timed(seconds, "extraction"):
            features = [protocol.extractor(batch).features for batch in batches]
        if len({found.shape[1] for found in features}) > 1:
            raise ValueError(
                f"images of different sizes in {images.name} have different numbers of features: prepare them in one "
                "size"
            )
        return Extracted(np.concatenate(features), None), 0

    key = {
        "images": images.fingerprint(), "count": images.count, "batch_size": batch_size, "protocol": protocol.name,
        "extractor": protocol.extractor.name, "version": shortcutflow.__version__,
    }  # fmt: skip
    checkpoint = checkpoint_file(path.parent, f"reference-{file_name(protocol.name)}", key, world)
    found = extract_all(
        extract, images.count, batch_size=batch_size, file=checkpoint, world=world,
        keep=MOST_FEATURES if with_features else 0,
    )  # fmt: skip
    if world.is_main:
        statistics = found.moments.statistics()
        record = ReferenceRecord(
            source=images.name, protocol=protocol.name, extractor=protocol.extractor.name, images=images.count,
            statistics_sha256=statistics_hash(statistics), features=len(found.features),
            fingerprint=images.fingerprint(), version=shortcutflow.__version__,
        )  # fmt: skip
        path.unlink(missing_ok=True)
        features_file.unlink(missing_ok=True)
        if len(found.features):
            header = {"statistics_sha256": record.statistics_sha256}
            write_whole(features_file, save({"features": found.features}, metadata=header))
        write_whole(record_file, record.model_dump_json(indent=2) + "\n")
        save_statistics(path, statistics)  # last, so that a reference with them is complete
    world.wait_for_all()
    remove_checkpoint(checkpoint)


def load_reference(path: Path, protocol: EvaluationProtocol, *, with_features: bool) -> Reference:
    """Read a reference from its .npz file, by the protocol that samples will be compared by.

    Raises:
        FileNotFoundError: without the file, or without features that are needed, saying how to make them.
        ValueError: if it was made by another protocol, or its files do not belong together.
    """
    statistics = load_statistics(path)
    record = _record(path, statistics_hash(statistics))
    for what, made_by, now in (
        ("protocol", record.protocol, protocol.name), ("extractor", record.extractor, protocol.extractor.name)
    ):  # fmt: skip
        if made_by is not None and made_by != now:
            raise ValueError(f"{path} was made by {what} {made_by!r}, not by {now!r}: their numbers do not compare")
    if not with_features:
        return Reference(statistics, None, record, str(path))
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds only mean and covariance: every metric but 'fid', 'is' and 'label_accuracy' needs the "
            f"features of the real images too, in {file.name} beside it, which `shortcutflow evaluate --make-stats "
            "SOURCE --out FILE.npz --with-features` writes; or name the images themselves"
        )
    with opened(file, "make the reference again", framework="np") as tensors:
        if (tensors.metadata() or {}).get("statistics_sha256") != record.statistics_sha256:
            raise ValueError(f"{file} belongs to other statistics than {path} holds: make the reference again")
        return Reference(statistics, np.asarray(tensors.get_tensor("features")), record, str(path))


def _record(path: Path, digest: str) -> ReferenceRecord:
    """What the file beside the statistics says of them; all is unknown without one."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return ReferenceRecord(source=str(path), statistics_sha256=digest)
    values: dict[str, Any] = read_object(file, "a reference")
    values.pop("probe", None)  # of version 0.1, as the name of the next
    if "pictures" in values:
        values["source"] = values.pop("pictures")
    try:
        record = ReferenceRecord(**values)
    except ValidationError as error:
        raise ValueError(
            f"{file} does not describe a reference ({wrong_fields(error)}); remove it if it is something else"
        ) from None
    if record.statistics_sha256 != digest:
        raise ValueError(f"{file} describes other statistics than {path} holds: make the reference again")
    return record


def clean_fid_reference(name: str, protocol: EvaluationProtocol, side: tuple[int, int]) -> Reference:
    """clean-fid's own statistics, which it fetches into its own folder once.

    Args:
        name: "DATASET-SPLIT" or "DATASET-SPLIT-SIZE", as "cifar10-train-32".
        protocol: must be "clean-fid".
        side: (height, width) of the samples, the size where the name has none.

    Raises:
        ValueError: if the name has another form, or the protocol is another.
        FileNotFoundError: if clean-fid has no such statistics, or they cannot be fetched.
        ImportError: without clean-fid.
    """
    source, parts = f"{CLEAN_FID}{name}", re.fullmatch(r"(\w+)-(\w+?)(?:-(\d+|na))?", name)
    if protocol.name != "clean-fid":
        raise ValueError(f"{source} goes with --protocol clean-fid, not {protocol.name}")
    if parts is None:
        raise ValueError(f"clean-fid's statistics are named as {CLEAN_FID}cifar10-train or -train-32, got {name!r}")
    try:
        from cleanfid.features import get_reference_statistics
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"clean-fid's statistics need clean-fid: pip install 'shortcutflow[eval]' ({error})"
        ) from error
    size = parts[3] or str(side[0])
    try:
        mu, sigma = get_reference_statistics(parts[1], size, split=parts[2])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(
            f"clean-fid's statistics of {parts[1]}, split {parts[2]}, size {size} cannot be read or fetched ({error})"
        ) from error
    statistics = Statistics(np.asarray(mu, np.float64), np.asarray(sigma, np.float64))
    require_statistics(source, statistics)
    record = ReferenceRecord(source=source, statistics_sha256=statistics_hash(statistics))
    return Reference(statistics, None, record, source)


def file_name(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
