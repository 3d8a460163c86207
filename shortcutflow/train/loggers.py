"""Where a run's numbers and images go: JSON lines, TensorBoard, and loggers of other packages or of the caller.

Another package adds a logger under the entry-point group ``shortcutflow.loggers``: a name, and what builds it from the
run's config, its folder and the number of optimizer steps done; docs/training.md shows Weights & Biases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shortcutflow import plugins
from shortcutflow.config import RunConfig
from shortcutflow.io.atomic import write_whole

METRICS_FILE = "metrics.jsonl"
ENTRY_POINT_GROUP = "shortcutflow.loggers"


class Logger(Protocol):
    """Receives a run's numbers and images, on rank 0 only."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Means since the last call, by name, after ``step`` optimizer steps; a value may be NaN."""

    def images(self, step: int, name: str, pixels: np.ndarray) -> None:
        """One image, (height, width, 3) uint8, after ``step`` optimizer steps."""

    def close(self) -> None:
        """Write out what is buffered; the run ends, by itself or by an error."""


class JSONLines:
    """``metrics.jsonl`` in the run's folder.

    Lines beyond ``step``, which a run left that was killed after its last checkpoint, are removed, so that a resumed
    run's file reads as if it had never stopped.
    """

    def __init__(self, config: RunConfig, run_dir: Path, step: int) -> None:
        path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        # Not in place: a kill in the middle would lose lines that no resumed run writes again.
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line."""
        # JSON knows no NaN; a metric that is one is written as null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()

    def images(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Nothing: JSON has no images."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """``tensorboard/`` in the run's folder."""

    def __init__(self, config: RunConfig, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write each as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write one image."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


BUILDERS: dict[str, Callable[[RunConfig, Path, int], Logger]] = {"tensorboard": TensorBoard}


def builders(names: Sequence[str]) -> list[Callable[[RunConfig, Path, int], Logger]]:
    """What builds the loggers of these names.

    Raises:
        ValueError: for an unknown name, listing the installed ones.
        ImportError: if a logger's package is not installed.
    """
    known = {*BUILDERS, *plugins.names(ENTRY_POINT_GROUP)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"training.loggers: {plugins.unknown('logger', unknown[0], known)}")
    if "tensorboard" in names:
        import torch.utils.tensorboard  # noqa: F401  # now, when there is no run's folder yet
    return [BUILDERS.get(name) or plugins.load(ENTRY_POINT_GROUP, name, "logger") for name in names]


@contextmanager
def open_loggers(config: RunConfig, run_dir: Path, step: int, more: Sequence[Logger]) -> Iterator[list[Logger]]:
    """JSON lines, the loggers that the config names, and those of the caller; all are closed at the end."""
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for logger in more:
            stack.callback(logger.close)
        for build in [JSONLines, *builders(config.training.loggers)]:
            loggers.append(build(config, run_dir, step))
            stack.callback(loggers[-1].close)
        yield [*loggers, *more]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
