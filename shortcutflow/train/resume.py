"""Where a run's steps begin: at 0, or at a checkpoint on which all ranks agree."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from shortcutflow.checkpoint import Checkpoint, folder_of, latest_in
from shortcutflow.config import CONFIG_FILE
from shortcutflow.distributed import World
from shortcutflow.io.atomic import require_absent
from shortcutflow.run_dir import CHECKPOINTS
from shortcutflow.train.loggers import METRICS_FILE


class Position(NamedTuple):
    """How far a run is when its steps begin; by default at the beginning.

    Attributes:
        step: optimizer steps done.
        skipped_steps: of them, how many were left out for numbers that were not finite.
        images_seen: samples of all ranks, whatever the batch sizes were.
        anchor: a step, and the fraction of training that was done before it. Schedules run on from here to the last
            step, so that a run resumed with another number of steps never falls back into a stage that is over.
    """

    step: int = 0
    skipped_steps: int = 0
    images_seen: int = 0
    anchor: tuple[int, float] = (0, 0.0)

    @classmethod
    def of(cls, step: int, state: dict[str, Any], steps: int) -> Position:
        """The position of a checkpoint, for a run that continues to ``steps``."""
        before = cls(step, state["skipped_steps"], state["images_seen"], tuple(state.get("anchor", (0, 0.0))))
        planned = state["config"]["training"]["steps"]
        if planned == steps or step == 0:
            return before
        return before._replace(anchor=(step - 1, before.progress_at(step - 1, planned)))

    def images_at(self, step: int, batch_size: int) -> int:
        """Samples seen after ``step`` steps."""
        return self.images_seen + (step - self.step) * batch_size

    def progress_at(self, step: int, steps: int) -> float:
        """The fraction of training that is done before a step, in [0, 1]."""
        since, before = self.anchor
        return before + (1 - before) * (step - since) / (steps - since)


def agreed_start(run_dir: Path, world: World, *, resume: bool) -> Checkpoint | None:
    """The checkpoint from which all ranks continue; None begins anew. What rank 0 sees counts.

    A torchrun agent counts the restarts of its own workers only, and starts them again without counting when a worker
    of another machine has died: one rank that knows of a restart is enough.

    Raises:
        ValueError: on every rank, if the folder holds a run that is not to be continued.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = any(world.gather(resume or restarted))
    last = latest_in(run_dir / CHECKPOINTS)
    refused = None if resume else _occupied(run_dir)
    refused, step = world.gather((refused, last.step if last is not None else None))[0]
    if refused is not None:
        raise ValueError(refused)
    return Checkpoint(folder_of(run_dir / CHECKPOINTS, step), step) if step is not None else None


def _occupied(run_dir: Path) -> str | None:
    """Why no new run can have this folder."""
    if (run_dir / CONFIG_FILE).exists():
        return f"{run_dir} holds a run already: --resume continues it, another --run-dir starts anew"
    try:
        require_absent(run_dir)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def keep_metrics(run_dir: Path) -> None:
    """Rename the numbers of a run that begins anew in its folder, as it has no checkpoint yet."""
    metrics = run_dir / METRICS_FILE
    if not (run_dir / CONFIG_FILE).exists():
        return
    message = f"{run_dir} has no checkpoint, so training begins at step 0"
    if metrics.exists():
        number = next(n for n in itertools.count(1) if not metrics.with_suffix(f".{n}.jsonl").exists())
        kept = metrics.rename(metrics.with_suffix(f".{number}.jsonl"))
        message += f"; the numbers so far are kept in {kept.name}"
    print(message, file=sys.stderr, flush=True)
