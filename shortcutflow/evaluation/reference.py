"""What samples are compared with: statistics of real images, and their features where a metric needs them.

::

    NAME.npz           mean and covariance of the features, in the authors' layout
    NAME.json          which images, which protocol, how many; and the hash of the statistics it belongs to
    NAME.safetensors   features of at most 50,000 of the images, if they were wanted
"""

from __future__ import annotations

import json
import re
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from shortcutflow.evaluation.feature_set import (
    WORK,
    FeatureSet,
    checkpoint_file,
    extract_all,
    hash_of,
    remove_checkpoint,
    timed,
)
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.real_images import RealImages
from shortcutflow.io.atomic import require_absent, require_ours, write_whole
from shortcutflow.io.safetensors import opened

MOST_FEATURES = 50_000
"""Images whose features are kept, for metrics that compare single images."""
CLEAN_FID = "clean-fid:"
"""Begins the names of clean-fid's own statistics."""


class Reference(NamedTuple):
    """A reference, ready to compare with.

    Attributes:
        statistics: mean and covariance of the features.
        features: (n, k) float32 of at most ``MOST_FEATURES`` images, or None.
        record: what is known of it, as its JSON file and reports say it: "source" (which images), "protocol",
            "extractor", "images" (how many), "statistics_sha256", "features" (how many), "fingerprint" (of the images)
            and "version" (of this library). Null is what nobody wrote down.
        file: of its statistics.
        reused: whether an earlier evaluation had made it of the same images.
    """

    statistics: Statistics
    features: np.ndarray | None
    record: dict[str, Any]
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
    path = folder / f"reference-{file_name(protocol.name)}-{digest}.npz"
    # Rank 0 alone decides: ranks that disagreed would wait for each other in different places.
    reused = world.gather(_is_usable(path, protocol, with_features) if world.is_main else None)[0]
    if not reused:
        make_reference(images, protocol, path, with_features=with_features, world=world, side=side)
    return load_reference(path, protocol, with_features=with_features)._replace(reused=reused)


def _is_usable(path: Path, protocol: EvaluationProtocol, with_features: bool) -> bool:
    try:
        load_reference(path, protocol, with_features=with_features)
    except (OSError, ValueError):  # absent, damaged, or without features
        return False
    return True


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
        images: real ones.
        protocol: whose extractor sees them.
        path: the .npz file; the others lie beside it.
        with_features: write those too.
        world: the ranks.
        batch_size: images at once.
        side: (height, width) that they must have, in pixels; None takes any.

    Raises:
        ValueError: for images that cannot be read or have another size, naming them.
        FileExistsError: if another program's files are there.
    """
    if images.count < 2:
        raise ValueError(f"a reference needs at least 2 images, {images.name} holds {images.count}")
    _require_ours(path)

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
        "images": images.fingerprint(), "protocol": protocol.name, "extractor": protocol.extractor.name,
        "version": shortcutflow.__version__,
    }  # fmt: skip
    file = checkpoint_file(path.parent / WORK, f"reference-{file_name(protocol.name)}", key, world)
    found = extract_all(
        extract, images.count, batch_size=batch_size, file=file, world=world,
        keep=MOST_FEATURES if with_features else 0,
    )  # fmt: skip
    if world.is_main:
        _write(path, found, images, protocol)
    world.wait_for_all()
    remove_checkpoint(file)


def _write(path: Path, found: FeatureSet, images: RealImages, protocol: EvaluationProtocol) -> None:
    """Write the files of a reference; the statistics come last, so that a reference with them is complete."""
    statistics = found.moments.statistics()
    digest = statistics_hash(statistics)
    record = _record_of(
        images.name, digest, protocol=protocol.name, extractor=protocol.extractor.name, images=images.count,
        features=len(found.kept), fingerprint=images.fingerprint(), version=shortcutflow.__version__,
    )  # fmt: skip
    path.unlink(missing_ok=True)
    features = path.with_suffix(".safetensors")
    features.unlink(missing_ok=True)
    if len(found.kept):
        write_whole(features, save({"features": found.features}, metadata={"statistics_sha256": digest}))
    write_whole(path.with_suffix(".json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    save_statistics(path, statistics)


def _require_ours(path: Path) -> None:
    """Refuse to replace files that are not those of a reference: its record, a .json, says that the others are."""
    for suffix in (".json", ".safetensors"):
        require_ours(path.with_suffix(suffix), b"statistics_sha256")
    if not path.with_suffix(".json").is_file():
        require_absent(path)


def load_reference(path: Path, protocol: EvaluationProtocol, *, with_features: bool) -> Reference:
    """Read a reference.

    Args:
        path: the .npz file.
        protocol: by which samples will be compared with it.
        with_features: whether features are needed.

    Raises:
        FileNotFoundError: without the file, or without features that are needed, saying how to make them.
        ValueError: if it was made by another protocol, or its files do not belong together.
    """
    statistics = load_statistics(path)
    digest = statistics_hash(statistics)
    record = _record(path, digest)
    for what, made_by, now in (
        ("protocol", record["protocol"], protocol.name), ("extractor", record["extractor"], protocol.extractor.name)
    ):  # fmt: skip
        if made_by is not None and made_by != now:
            raise ValueError(f"{path} was made by {what} {made_by!r}, not by {now!r}: their numbers do not compare")
    return Reference(statistics, _features(path, digest) if with_features else None, record, str(path))


def _record(path: Path, digest: str) -> dict[str, Any]:
    """What the file beside the statistics says of them; all is unknown without one."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return _record_of(str(path), digest)
    try:
        values = dict(json.loads(file.read_text()))
        values.pop("probe", None)  # of earlier versions, as the name of the next
        record = _record_of(values.pop("pictures", None) or values.pop("source"), **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} does not describe a reference ({error}); remove it if it is something else") from None
    if record["statistics_sha256"] != digest:
        raise ValueError(f"{file} describes other statistics than {path} holds: make the reference again")
    return record


def _record_of(
    source: str, statistics_sha256: str, *, protocol: str | None = None, extractor: str | None = None,
    images: int | None = None, features: int = 0, fingerprint: str | None = None, version: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "source": source, "protocol": protocol, "extractor": extractor, "images": images,
        "statistics_sha256": statistics_sha256, "features": features, "fingerprint": fingerprint, "version": version,
    }  # fmt: skip


def _features(path: Path, digest: str) -> np.ndarray:
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds only mean and covariance: every metric but 'fid', 'is' and 'label_accuracy' needs the "
            f"features of the real images too, in {file.name} beside it, which `shortcutflow evaluate --make-stats "
            "SOURCE --out FILE.npz --with-features` writes; or name the images themselves"
        )
    with opened(file, "make the reference again", framework="np") as tensors:
        if (tensors.metadata() or {}).get("statistics_sha256") != digest:
            raise ValueError(f"{file} belongs to other statistics than {path} holds: make the reference again")
        return np.asarray(tensors.get_tensor("features"))


def clean_fid_reference(name: str, protocol: EvaluationProtocol, side: tuple[int, int]) -> Reference:
    """clean-fid's own statistics, which it fetches into its own folder once.

    Args:
        name: "DATASET-SPLIT" or "DATASET-SPLIT-SIZE", as "cifar10-train-32".
        protocol: by which samples will be compared with it; it must be "clean-fid".
        side: (height, width) of the samples, the size where the name has none.

    Raises:
        ValueError: if the name has another form, or the protocol is another.
        FileNotFoundError: if clean-fid has no such statistics, or they cannot be fetched.
        ImportError: without clean-fid.
    """
    if protocol.name != "clean-fid":
        raise ValueError(f"{CLEAN_FID}{name} goes with --protocol clean-fid, not {protocol.name}")
    parts = re.fullmatch(r"(\w+)-(\w+?)(?:-(\d+|na))?", name)
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
    require_statistics(f"{CLEAN_FID}{name}", statistics)
    source = f"{CLEAN_FID}{name}"
    return Reference(statistics, None, _record_of(source, statistics_hash(statistics)), source)


def file_name(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
