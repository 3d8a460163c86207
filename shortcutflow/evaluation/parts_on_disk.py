"""Features in parts of a fixed size on the disk: what a stopped evaluation goes on from.

Part i holds the features of samples [1000 i, 1000 i + 1000), however many processes made them and in whatever batches.
A part is written whole or not at all. Its folder's name is a hash of everything that determines its numbers, and a
probe of the extractor lies in it, so parts of something else are never taken for these.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from shortcutflow.distributed import Rank
from shortcutflow.evaluation.distances.statistics import Moments, Statistics
from shortcutflow.evaluation.probe import Probe
from shortcutflow.evaluation.together import Team
from shortcutflow.io.atomic import locked, write_whole
from shortcutflow.io.safetensors import opened

PART_SIZE = 1000
WORK = "evaluation-work"
"""The folder beside a report that holds what is being made."""
KEY_FILE, PROBE_FILE = "key.json", "probe.json"
LOCK = ".lock"
_AGAIN = "the same command makes it again"


class Features(NamedTuple):
    """What an extractor saw in some images.

    Attributes:
        features: (n, k) float32.
        logits: (n, classes) float32, or None if the extractor gives none.
        seconds: spent on it, by phase.
    """

    features: np.ndarray
    logits: np.ndarray | None
    seconds: dict[str, float]


def hash_of(key: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a key as JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def file_name(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


class PartsFolder:
    """A folder of parts.

    Args:
        work: the folder to make it in.
        name: what its name begins with, for people.
        key: everything that determines the parts' numbers, as JSON; it is written into the folder.
        probe: what the extractor sees now. Parts of one that saw something else are made again.
    """

    def __init__(self, work: Path, name: str, key: Mapping[str, Any], probe: Probe) -> None:
        self.key, self.probe = key, probe
        self.path = work / f"{name}-{hash_of(key)}"

    def make(self, part: range, features: Features) -> None:
        """Write a part, whole or not at all."""
        tensors = {"features": np.ascontiguousarray(features.features, dtype=np.float32)}
        if features.logits is not None:
            tensors["logits"] = np.ascontiguousarray(features.logits, dtype=np.float32)
        write_whole(self._file(part), save(tensors, metadata={"seconds": json.dumps(features.seconds)}))

    def holds(self, part: range) -> bool:
        """Whether the part is there and can be read; a damaged one is made again."""
        try:
            with opened(self._file(part), _AGAIN, framework="np") as file:
                return bool(file.get_slice("features").get_shape()[0] == len(part))
        except (OSError, ValueError):
            return False

    def read(self, part: range) -> Features:
        """Read a part.

        Raises:
            FileNotFoundError, ValueError: if it cannot be read.
        """
        with opened(self._file(part), _AGAIN, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            seconds = json.loads((file.metadata() or {}).get("seconds", "{}"))
        return Features(tensors["features"], tensors.get("logits"), seconds)

    def begin(self) -> None:
        """Make the folder, with its key and probe in it; parts of another extractor go."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._is_of_this_extractor():
            for part in self.path.glob("part-*.safetensors"):
                part.unlink()
            write_whole(self.path / PROBE_FILE, json.dumps(asdict(self.probe)) + "\n")
        if not (self.path / KEY_FILE).is_file():
            write_whole(self.path / KEY_FILE, json.dumps(self.key, indent=2, sort_keys=True) + "\n")

    def _is_of_this_extractor(self) -> bool:
        try:
            return self.probe.agrees_with(Probe(**json.loads((self.path / PROBE_FILE).read_text())))
        except (OSError, ValueError, TypeError):
            return False

    def remove(self) -> None:
        """Delete the folder, and the one it lies in if nothing else does."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other evaluations out: they might delete the parts while these are needed.

        Raises:
            ValueError: if another one is at work in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / LOCK, wait=False))
            except BlockingIOError:
                raise ValueError(
                    f"another evaluation of the same samples is at work in {self.path}: wait for it, or name another "
                    "folder with --out"
                ) from None
            self.begin()
            yield

    def _file(self, part: range) -> Path:
        # Both ends: the last part of fewer samples is not that of more.
        return self.path / f"part-{part.start:08d}-{part.stop:08d}.safetensors"


@contextmanager
def held_by(team: Team, folders: Iterable[PartsFolder]) -> Iterator[None]:
    """Make the folders and hold them for all processes of a team, which begin together.

    Raises:
        ValueError: if another evaluation is at work in one of them.
    """
    with ExitStack() as stack:
        if team.leads:
            for folder in folders:
                stack.enter_context(folder.held())
        team.wait()
        yield


def cut(count: int, size: int = PART_SIZE) -> list[range]:
    """Samples 0 ... count - 1 in parts."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def share_of(rank: Rank, parts: Sequence[range]) -> list[range]:
    """The parts that a process makes: its own, and each as many further on as there are processes."""
    return list(parts[rank.number :: rank.world_size])


def joined(batches: Sequence[Features]) -> Features:
    """Several batches as one part, in this order.

    Raises:
        ValueError: if they have different numbers of features.
    """
    widths = {batch.features.shape[1] for batch in batches}
    if len(widths) > 1:
        raise ValueError(
            f"pictures of different sizes give {', '.join(map(str, sorted(widths)))} features: prepare them in one size"
        )
    logits = [batch.logits for batch in batches if batch.logits is not None]
    features = np.concatenate([batch.features for batch in batches])
    return Features(features, np.concatenate(logits) if logits else None, added_up([b.seconds for b in batches]))


def added_up(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by phase, of all."""
    phases = dict.fromkeys(phase for spent in seconds for phase in spent)
    return {phase: sum(spent.get(phase, 0.0) for spent in seconds) for phase in phases}


class Merged(NamedTuple):
    """All parts together.

    Attributes:
        statistics: mean and covariance of all features.
        features: (m, k) float32, evenly spaced rows of all, or None if they were not asked for.
        logits: (n, classes) float32 or None.
        seconds: by phase, of all processes.
    """

    statistics: Statistics
    features: np.ndarray | None
    logits: np.ndarray | None
    seconds: dict[str, float]


def merged(folder: PartsFolder, parts: Sequence[range], *, keep: int = 0, logits: bool = False) -> Merged:
    """Put the parts together in their order, one in memory at a time beside what is kept.

    Args:
        folder: of the parts.
        parts: all of them.
        keep: keep so many rows of the features, or all if there are fewer.
        logits: keep those.
    """
    count = sum(len(part) for part in parts)
    wanted = np.arange(min(keep, count)) * count // max(1, min(keep, count))
    moments, rows, kept_logits, seconds = Moments(), [], [], []
    for part in parts:
        found = folder.read(part)
        moments.add(found.features)
        inside = wanted[(wanted >= part.start) & (wanted < part.stop)] - part.start
        rows.append(found.features[inside])
        if logits and found.logits is not None:
            kept_logits.append(found.logits)
        seconds.append(found.seconds)
    return Merged(
        moments.statistics(), np.concatenate(rows) if keep else None,
        np.concatenate(kept_logits) if kept_logits else None, added_up(seconds),
    )  # fmt: skip
