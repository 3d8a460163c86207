"""What samples are compared with: statistics of real pictures, and their features where a metric needs them.

::

    NAME.npz           mean and covariance of the features, in the authors' layout
    NAME.json          which pictures, which protocol, how many; and the hash of the statistics it belongs to
    NAME.safetensors   features of at most 50,000 of the pictures, if they were asked for
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

import shortcutflow
from shortcutflow.evaluation.clock import Clock
from shortcutflow.evaluation.distances.statistics import load_statistics, save_statistics, statistics_hash
from shortcutflow.evaluation.features.extractors import Extractor
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.measures import MOST_ROWS, Real
from shortcutflow.evaluation.parts_on_disk import (
    Features,
    Merged,
    PartsFolder,
    cut,
    file_name,
    held_by,
    joined,
    merged,
    share_of,
)
from shortcutflow.evaluation.pictures import Pictures
from shortcutflow.evaluation.probe import Probe
from shortcutflow.evaluation.together import ALONE, Team
from shortcutflow.io.atomic import require_absent, require_ours, write_whole
from shortcutflow.io.safetensors import opened


@dataclass(frozen=True)
class ReferenceRecord:
    """What is known of a reference, for reports and the file beside it.

    Attributes:
        pictures: where they came from.
        protocol, extractor: by which their features were made; None if nobody wrote it down.
        images: how many; None likewise.
        statistics_sha256: of the statistics.
        features: how many pictures' own features are there.
        fingerprint: of the pictures.
        version: of this library that made it.
        probe: what the extractor saw in one fixed picture.
    """

    pictures: str
    protocol: str | None
    extractor: str | None
    images: int | None
    statistics_sha256: str
    features: int = 0
    fingerprint: str | None = None
    version: str | None = None
    probe: Probe | None = None


@dataclass(frozen=True)
class Reference:
    """A reference, ready to compare with.

    Attributes:
        real: its statistics, and features or None.
        record: what is known of it.
        file: of its statistics.
        kept: whether they are those that an earlier evaluation made of the pictures.
    """

    real: Real
    record: ReferenceRecord
    file: Path
    kept: bool = False


def make_reference(
    pictures: Pictures,
    protocol: EvaluationProtocol,
    path: Path,
    *,
    with_features: bool,
    work: Path,
    team: Team = ALONE,
    batch_size: int = 100,
    side: tuple[int, int] | None = None,
    probe: Probe | None = None,
) -> None:
    """Extract the features of pictures, and write the reference; all processes of a team call this together.

    The same call goes on after a stop.

    Args:
        pictures: real ones.
        protocol: whose extractor sees them.
        path: the .npz file; the others lie beside it.
        with_features: write those too.
        work: a folder for what is unfinished.
        team: the processes that share the work.
        batch_size: pictures extracted at once.
        side: (height, width) that they must have, in pixels; None takes any.
        probe: of the extractor, if it was made before.

    Raises:
        ValueError: for pictures that cannot be read or have another size, naming them.
    """
    if pictures.count < 2:
        raise ValueError(f"a reference needs at least 2 pictures, {pictures.name} holds {pictures.count}")
    _require_ours(path)
    probe = probe or Probe.of(protocol.extractor, next(pictures.read(range(1))).shape[:2])
    key = {
        "pictures": pictures.fingerprint(), "protocol": protocol.name, "extractor": protocol.extractor.name,
        "version": shortcutflow.__version__,
    }  # fmt: skip
    folder, parts = PartsFolder(work, f"reference-{file_name(protocol.name)}", key, probe), cut(pictures.count)
    with held_by(team, [folder]):
        missing = [part for part in share_of(team.rank, parts) if not folder.holds(part)]
        with tqdm(total=sum(map(len, missing)), desc="reference", unit="image", disable=not team.leads) as bar:
            for part in missing:
                folder.make(part, _part(pictures, part, protocol.extractor, batch_size, side, bar))
        team.wait()
        if team.leads:
            found = merged(folder, parts, keep=MOST_ROWS if with_features else 0)
            _write(path, found, _record_of(pictures, protocol, found, probe))
            folder.remove()
        team.wait()


def _require_ours(path: Path) -> None:
    """Refuse to replace files that are not those of a reference: its record, a .json, says that the others are."""
    for suffix in (".json", ".safetensors"):
        require_ours(path.with_suffix(suffix), b"statistics_sha256")
    if not path.with_suffix(".json").is_file():
        require_absent(path)


def remove_reference(path: Path) -> None:
    """Delete the files of a reference that is to be made again.

    Raises:
        FileExistsError: if they are something else.
    """
    _require_ours(path)
    for suffix in (".npz", ".json", ".safetensors"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _record_of(pictures: Pictures, protocol: EvaluationProtocol, found: Merged, probe: Probe) -> ReferenceRecord:
    return ReferenceRecord(
        pictures=pictures.name, protocol=protocol.name, extractor=protocol.extractor.name, images=pictures.count,
        statistics_sha256=statistics_hash(found.statistics), fingerprint=pictures.fingerprint(),
        features=len(found.features) if found.features is not None else 0, version=shortcutflow.__version__,
        probe=probe,
    )  # fmt: skip


def _part(
    pictures: Pictures, part: range, extractor: Extractor, batch_size: int, side: tuple[int, int] | None, bar: tqdm
) -> Features:
    clock, made = Clock(), []
    for batch in _batches(pictures.read(part), batch_size):
        if side is not None and batch.shape[1:3] != side:
            raise ValueError(
                f"{pictures.name} holds a picture of {batch.shape[2]}x{batch.shape[1]} pixels, the samples have "
                f"{side[1]}x{side[0]}: make a reference of the same size with --make-stats --size {side[0]}"
            )
        with clock.phase("extraction"):
            extracted = extractor(batch)
        made.append(Features(extracted.features, None, {}))
        bar.update(len(batch))
    return joined(made)._replace(seconds=clock.seconds)


def _batches(pictures: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Pictures of the same size together, in their order."""
    batch: list[np.ndarray] = []
    for picture in pictures:
        if batch and (len(batch) == size or picture.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield np.stack(batch)


def _write(path: Path, found: Merged, record: ReferenceRecord) -> None:
    """Write the files of a reference; the statistics come last, so that a reference with them is complete."""
    path.with_suffix(".npz").unlink(missing_ok=True)
    features = path.with_suffix(".safetensors")
    features.unlink(missing_ok=True)
    if found.features is not None:
        write_whole(
            features, save({"features": found.features}, metadata={"statistics_sha256": record.statistics_sha256})
        )
    write_whole(path.with_suffix(".json"), json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")
    save_statistics(path, found.statistics)


def load_reference(
    path: Path,
    protocol: EvaluationProtocol,
    *,
    with_features: bool,
    name: str | None = None,
    probe: Probe | None = None,
) -> Reference:
    """Read a reference.

    Args:
        path: the .npz file.
        protocol: by which samples will be compared with it.
        with_features: whether features are needed.
        name: for reports; None is the path.
        probe: of the extractor, if it was made before.

    Raises:
        FileNotFoundError: without the file, or without features that are needed, saying how to make them.
        ValueError: if it was made by another protocol, or its files do not belong together.
    """
    statistics = load_statistics(path)
    digest = statistics_hash(statistics)
    record = _record(path, digest, name or str(path))
    for what, theirs, ours in (
        ("protocol", record.protocol, protocol.name), ("extractor", record.extractor, protocol.extractor.name)
    ):  # fmt: skip
        if theirs is not None and theirs != ours:
            raise ValueError(f"{path} was made by {what} {theirs!r}, not by {ours!r}: their numbers do not compare")
    if record.probe is not None:
        side = record.probe.height, record.probe.width
        if probe is None or (probe.height, probe.width) != side:
            probe = Probe.of(protocol.extractor, side)
        if not record.probe.agrees_with(probe):
            raise ValueError(
                f"{path} was made by another {protocol.extractor.name!r} than this one, in version {record.version}: "
                "make it again"
            )
    return Reference(Real(statistics, _features(path, digest) if with_features else None), record, path)


def _record(path: Path, digest: str, name: str) -> ReferenceRecord:
    file = path.with_suffix(".json")
    if not file.is_file():
        return ReferenceRecord(name, protocol=None, extractor=None, images=None, statistics_sha256=digest)
    try:
        said = json.loads(file.read_text())
        record = ReferenceRecord(**said | {"probe": Probe(**said["probe"]) if said.get("probe") else None})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a reference ({error}); remove it if it is something else") from None
    if record.statistics_sha256 != digest:
        raise ValueError(f"{file} describes other statistics than {path} holds: make the reference again")
    return record


def _features(path: Path, digest: str) -> np.ndarray:
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds only mean and covariance: every metric but 'fid' and 'is' needs the features of the real "
            f"pictures too, in {file.name} beside it, which `shortcutflow evaluate --make-stats SOURCE --out FILE.npz "
            "--with-features` writes; or name the pictures themselves"
        )
    with opened(file, "make the reference again", framework="np") as tensors:
        if (tensors.metadata() or {}).get("statistics_sha256") != digest:
            raise ValueError(f"{file} belongs to other statistics than {path} holds: make the reference again")
        return np.asarray(tensors.get_tensor("features"))
