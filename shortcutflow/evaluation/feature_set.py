"""Features of many images, extracted by all ranks: their moments, and themselves where a metric needs them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    filled = [array for array in arrays if array.size]
    return np.concatenate(filled) if filled else np.zeros((0, 0), np.float32)


@dataclass
class FeatureSet:
    """What was extracted from the first so many images of a rank, or from all images.

    Attributes:
        done: how many images these are.
        features: (m, k) float32, of those whose features are kept.
        logits: (done, classes) float32, or (0, 0) if they are not kept.
        moments: of the features of all.
        correct: images whose label was read as the one they were sampled with.
        seconds: spent, by phase.
    """

    done: int = 0
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    moments: Moments = field(default_factory=Moments)
    correct: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "features": self.features, "logits": self.logits, "mean": self.moments.mean, "scatter": self.moments.scatter
        }  # fmt: skip
        counts = {"done": self.done, "correct": self.correct, "seconds": self.seconds}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_whole(path, save(arrays, metadata={name: json.dumps(count) for name, count in counts.items()}))

    @classmethod
    def load(cls, path: Path) -> FeatureSet:
        """Read it; FileNotFoundError or ValueError if it is not there, or damaged."""
        with opened(path, "the same command makes it again", framework="np") as file:
            found: dict[str, Any] = {name: np.array(file.get_tensor(name)) for name in list(file.keys())}
            found |= {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        try:
            return cls(moments=Moments(found["done"], found.pop("mean"), found.pop("scatter")), **found)
        except (KeyError, TypeError):
            raise ValueError(f"{path} holds no features") from None


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
        file: of this rank for this count and batch size, see :func:`checkpoint_file`.
        world: the ranks.
        keep: features of so many images are kept, evenly spaced.
        keep_logits: keep the logits of all.
        folder: where ``extract`` saves the images; what is in the file but not in here is made again.

    Returns:
        Those of all images in their order on rank 0; elsewhere only the moments are of all.
    """
    wanted = np.arange(min(keep, count)) * count // max(1, min(keep, count))
    every = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    batches = every[world.rank :: world.size]
    found = _resumed(file, batches, wanted, keep_logits, folder)
    features, logits, saved, images = [found.features], [found.logits], found.done, sum(map(len, batches))
    with tqdm(total=images, initial=saved, unit="image", mininterval=1, disable=not world.is_main) as bar:
        for batch in batches[-(-saved // batch_size) :]:  # but for those that are done
            extracted, correct = extract(batch, found.seconds)
            found.moments.add(extracted.features)
            found.done += len(batch)
            found.correct += correct
            features.append(extracted.features[np.isin(np.array(batch), wanted)])
            if keep_logits and extracted.logits is not None:
                logits.append(extracted.logits)
            bar.update(len(batch))
            if found.done - saved >= CHECKPOINT_EVERY or batch is batches[-1]:
                found.features, found.logits, saved = _joined(features), _joined(logits), found.done
                features, logits = [found.features], [found.logits]
                found.save(file)
    return found if world.cpu_group is None else _gathered(found, every, wanted, world)


def _gathered(found: FeatureSet, batches: Sequence[range], wanted: np.ndarray, world: World) -> FeatureSet:
    """Those of all ranks in the order of the images, on rank 0; elsewhere only the moments are of all."""
    moments, own = found.moments.all_reduced(world), replace(found, moments=Moments())
    parts: list[FeatureSet] | None = [own] * world.size if world.is_main else None
    torch.distributed.gather_object(own, parts, group=world.cpu_group)
    if parts is None:
        return replace(own, moments=moments)
    index = np.array([i for rank in range(world.size) for batch in batches[rank :: world.size] for i in batch])
    features, logits = _joined(part.features for part in parts), _joined(part.logits for part in parts)
    seconds: dict[str, float] = {}
    for part in parts:
        for phase, spent in part.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return FeatureSet(
        len(index), features[np.argsort(index[np.isin(index, wanted)])],
        logits[np.argsort(index)] if logits.size else logits, moments, sum(part.correct for part in parts), seconds,
    )  # fmt: skip


def _resumed(
    file: Path, batches: Sequence[range], wanted: np.ndarray, keep_logits: bool, folder: Path | None
) -> FeatureSet:
    """What the file holds; nothing if features, logits or images are wanted that were not kept."""
    try:
        found = FeatureSet.load(file)
    except (OSError, ValueError):
        return FeatureSet()
    done = [i for batch in batches for i in batch][: found.done]
    if not len(wanted):
        found.features = found.features[:0]
    lacks_features = len(found.features) != np.isin(done, wanted).sum()
    lacks_logits = keep_logits and len(found.logits) != found.done
    lacks_images = folder is not None and not all(png_path(folder, i).is_file() for i in done)
    return FeatureSet() if lacks_features or lacks_logits or lacks_images else found


def checkpoint_file(folder: Path, name: str, key: Mapping[str, Any], world: World) -> Path:
    """The file of a rank's features: another one for another key, which is all that determines them, as JSON."""
    return folder / WORK / f"{name}-{hash_of(key)}-rank-{world.rank}-of-{world.size}.safetensors"


def remove_checkpoint(file: Path) -> None:
    """Delete a rank's file, and the folder if nothing else lies in it."""
    file.unlink(missing_ok=True)
    with suppress(OSError):
        file.parent.rmdir()


def hash_of(key: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a key as JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
