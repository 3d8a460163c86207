"""A run's numbers: averaged between log lines without waiting for the device, kept as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcutflow.io.atomic import write_whole
from shortcutflow.types import LossReport, Mean

METRICS_FILE = "metrics.jsonl"


LEVELS = 32
"""Step sizes 1, 1/2, ... whose bootstrap errors are kept apart."""


class RunningMeans:
    """Means of the metrics since the last log line, and of the bootstrap error by step size."""

    def __init__(self) -> None:
        self._sums: dict[str, Mean] = {}
        # Sums of errors and numbers of rows by level log2(1/d), made on the device of the first report.
        self._error_and_rows: Tensor | None = None

    def add(self, report: LossReport, **more: Tensor) -> None:
        """Add one part's report; nothing is read back from the device."""
        for name, mean in (report.means | {name: Mean(value) for name, value in more.items()}).items():
            before = self._sums.get(name, Mean(torch.zeros_like(mean.total), 0))
            self._sums[name] = Mean(before.total + mean.total.float(), before.rows + mean.rows, mean.root)
        n, d = report.targets.n_bootstrap, report.targets.d
        if self._error_and_rows is None:
            self._error_and_rows = torch.zeros(LEVELS, 2, device=d.device)
        error, level = report.row_loss[:n].float(), (-torch.log2(d[:n])).round().long().clamp(0, LEVELS - 1)
        self._error_and_rows.index_add_(0, level, torch.stack([error, torch.ones_like(error)], dim=1))

    def take(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means so far, over all processes, by name; then start anew. Metrics without a row anywhere are left out.

        ``error_at/d=1_64`` is the bootstrap error at step size 1/64.
        """
        if self._error_and_rows is None:
            return {}
        # One exchange, and one wait: every process has the same names, whatever rows its share holds.
        sums = torch.stack([mean.total for mean in self._sums.values()])
        rows = sums.new_tensor([mean.rows for mean in self._sums.values()])
        table = sum_over_processes(torch.cat([torch.stack([sums, rows], dim=1), self._error_and_rows])).tolist()
        means = {}
        for (name, mean), (total, count) in zip(self._sums.items(), table, strict=False):
            if count > 0:
                means[name] = math.sqrt(total / count) if mean.root and total >= 0 else total / count
        for level, (error, count) in enumerate(table[len(self._sums) :]):
            if count > 0:
                means[f"error_at/d=1_{2**level}"] = error / count
        self._sums, self._error_and_rows = {}, None
        return means


class MetricsLog:
    """Writes numbers and pictures of a run to ``metrics.jsonl`` and ``tensorboard/`` in its folder.

    Args:
        run_dir: the run's folder.
        resume_at: optimizer steps done; lines beyond it, left by a run that was killed after its last checkpoint, are
            removed, so that a resumed run's file reads as if it had never stopped.
    """

    def __init__(self, run_dir: Path, *, resume_at: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= resume_at]
        # Not in place: a kill in the middle would lose lines that no resumed run writes again.
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_at + 1 if resume_at else None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Write one line and the same numbers as TensorBoard scalars."""
        # JSON knows no NaN; a metric that is one is written as null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Show a picture, (height, width, 3) uint8, in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        self._board.close()


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
