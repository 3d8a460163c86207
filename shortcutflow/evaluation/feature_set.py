"""Features of many images, extracted by all ranks: their moments, and themselves where a metric needs them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from tqdm import tqdm

from shortcutflow.distributed import World
from shortcutflow.evaluation.distances.statistics import Moments
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.real_images import png_path
from shortcutflow.io.atomic import write_whole
from shortcutflow.io.safetensors import opened

CHECKPOINT_EVERY = 2000
"""Images of a rank from one checkpoint of its features to the next."""
WORK = "evaluation-work"
"""The folder beside a report that holds these checkpoints."""
ARRAYS = ("index", "kept", "features", "logits")


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Add the wall seconds of what is done in here to ``seconds[phase]``; a GPU is waited for."""
    start = time.perf_counter()
    try:
        yield
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class FeatureSet:
    """What was extracted from some images.

    Attributes:
        index: (n,) int64, the images.
        kept: (m,) int64, the images whose features are kept.
        features: (m, k) float32, of those.
        logits: (n, classes) float32, or (0, 0) if they are not kept.
        moments: of the features of all n.
        correct: images whose label was read as the one they were sampled with.
        seconds: spent, by phase.
    """

    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    moments: Moments = field(default_factory=Moments)
    correct: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def extended(self, others: Sequence[FeatureSet]) -> FeatureSet:
        """With those of other images after it; the moments stay its own."""
        arrays = {}
        for name in ARRAYS:
            filled = [array for part in (self, *others) if (array := getattr(part, name)).size]
            arrays[name] = np.concatenate(filled) if filled else getattr(self, name)
        phases = dict.fromkeys(phase for part in (self, *others) for phase in part.seconds)
        seconds = {phase: sum(part.seconds.get(phase, 0.0) for part in (self, *others)) for phase in phases}
        correct = sum(part.correct for part in (self, *others))
        return FeatureSet(**arrays, moments=self.moments, correct=correct, seconds=seconds)

    def gathered(self, world: World) -> FeatureSet:
        """Those of all ranks in the order of the images, on rank 0; elsewhere only the moments are of all."""
        if world.cpu_group is None:
            return self
        moments = self.moments.all_reduced(world)
        own = replace(self, moments=Moments())
        parts: list[FeatureSet] | None = [own] * world.size if world.is_main else None
        torch.distributed.gather_object(own, parts, group=world.cpu_group)
        found = FeatureSet().extended(parts) if parts is not None else own
        by_index, by_kept = np.argsort(found.index), np.argsort(found.kept)
        return replace(
            found, moments=moments, index=found.index[by_index], kept=found.kept[by_kept],
            features=found.features[by_kept], logits=found.logits[by_index] if found.logits.size else found.logits,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write it, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        arrays |= {"mean": self.moments.mean, "scatter": self.moments.scatter}
        write_whole(path, save(arrays, metadata={"correct": str(self.correct), "seconds": json.dumps(self.seconds)}))

    @classmethod
    def load(cls, path: Path) -> FeatureSet:
        """Read it.

        Raises:
            FileNotFoundError, ValueError: if it is not there, or damaged.
        """
        with opened(path, "the same command makes it again", framework="np") as file:
            metadata, names = file.metadata() or {}, (*ARRAYS, "mean", "scatter")
            if not {"correct", "seconds"} <= metadata.keys() or not set(names) <= set(file.keys()):
                raise ValueError(f"{path} holds no features")
            arrays = {name: np.array(file.get_tensor(name)) for name in names}
        moments = Moments(len(arrays["index"]), arrays.pop("mean"), arrays.pop("scatter"))
        return cls(**arrays, moments=moments, correct=int(metadata["correct"]), seconds=json.loads(metadata["seconds"]))


def extract_all(
    extract: Callable[[range, dict[str, float]], tuple[Extracted, int]],
    count: int,
    *,
    batch_size: int,
    file: Path,
    world: World,
    keep: int = 0,
    keep_logits: bool = False,
    folder: Path | None = None,
) -> FeatureSet:
    """Extract the features of images 0 ... count - 1, shared by all ranks, each of which must call this.

    Rank r of w takes every w-th batch, from the r-th on. Every ``CHECKPOINT_EVERY`` images and at the end it writes
    what it has into its file, from which the same call goes on after a stop.

    Args:
        extract: the features of some images, and how many of them are read as their label; adds seconds by phase.
        count: of the images.
        batch_size: images at once.
        file: of this rank, see :func:`checkpoint_file`.
        world: the ranks.
        keep: features of so many images are kept, evenly spaced.
        keep_logits: keep the logits of all.
        folder: where ``extract`` saves the images; what is in the file but not in here is made again.

    Returns:
        See :meth:`FeatureSet.gathered`.
    """
    starts = range(world.rank * batch_size, count, world.size * batch_size)
    batches = [range(start, min(start + batch_size, count)) for start in starts]
    wanted = np.arange(min(keep, count)) * count // max(1, min(keep, count))
    found = _resumed(file, batches, wanted, keep_logits, folder)
    pending: list[FeatureSet] = []
    images = sum(map(len, batches))
    with tqdm(total=images, initial=len(found.index), unit="image", mininterval=1, disable=not world.is_main) as bar:
        for batch in batches:
            if len(found.index) and batch.start <= found.index[-1]:
                continue
            seconds: dict[str, float] = {}
            extracted, correct = extract(batch, seconds)
            found.moments.add(extracted.features)
            index = np.array(batch)
            is_kept = np.isin(index, wanted)
            part = FeatureSet(index, index[is_kept], extracted.features[is_kept], correct=correct, seconds=seconds)
            if keep_logits and extracted.logits is not None:
                part.logits = extracted.logits
            pending.append(part)
            bar.update(len(batch))
            if sum(len(part.index) for part in pending) >= CHECKPOINT_EVERY or batch is batches[-1]:
                found, pending = found.extended(pending), []
                found.save(file)
    return found.gathered(world)


def _resumed(
    file: Path, batches: Sequence[range], wanted: np.ndarray, keep_logits: bool, folder: Path | None
) -> FeatureSet:
    """What the file holds; nothing if it is of other images than the first of these batches, or not enough."""
    try:
        found = FeatureSet.load(file)
    except (OSError, ValueError):
        return FeatureSet()
    last = max(found.index, default=-1)
    done = [i for batch in batches if batch.stop <= last + 1 for i in batch]
    lacks_features = np.setdiff1d(np.intersect1d(wanted, found.index), found.kept).size
    lacks_logits = keep_logits and not found.logits.size
    lacks_images = folder is not None and not all(png_path(folder, i).is_file() for i in done)
    if found.index.tolist() != done or lacks_features or lacks_logits or lacks_images:
        return FeatureSet()
    return found


def checkpoint_file(folder: Path, name: str, key: Mapping[str, Any], world: World) -> Path:
    """The file of a rank's features: another one for another key, which is all that determines them, as JSON."""
    return folder / f"{name}-{hash_of(key)}-rank-{world.rank}-of-{world.size}.safetensors"


def remove_checkpoint(file: Path) -> None:
    """Delete a rank's file, and the folder if nothing else lies in it."""
    file.unlink(missing_ok=True)
    with suppress(OSError):
        file.parent.rmdir()


def hash_of(key: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a key as JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
