"""A run's numbers: averaged between log lines without waiting for the device, kept as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcutflow.durable import write_whole
from shortcutflow.types import LossReport

METRICS_FILE = "metrics.jsonl"


class Averages:
    """Means of the metrics since the last log line, and of the bootstrap error by step size."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # Sums of errors and numbers of rows by level log2(1/d), made on the device of the first report.
        self._error_and_rows: Tensor | None = None

    def add(self, report: LossReport, **more: Tensor) -> None:
        """Add one step's report; nothing is read back from the device."""
        n = report.targets.n_bootstrap
        # Shares of a batch may differ in how many rows of a kind they have.
        rows = {"loss_bootstrap": n, "loss_flow": len(report.row_loss) - n}
        for name, value in (report.metrics | more).items():
            value, count = value.float() * rows.get(name, 1), rows.get(name, 1)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + count
        if n > 0:
            self._add_errors(report.row_loss[:n].float(), report.targets.d[:n])

    def _add_errors(self, error: Tensor, d: Tensor) -> None:
        if self._error_and_rows is None:
            self._error_and_rows = torch.zeros(32, 2, device=d.device)
        level = (-torch.log2(d)).round().long().clamp(0, 31)
        self._error_and_rows.index_add_(0, level, torch.stack([error, torch.ones_like(error)], dim=1))

    def take(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means so far, over all processes, by name; then start anew.

        ``error_at/d=1_64`` is the bootstrap error at step size 1/64.
        """
        means: dict[str, float] = {}
        if self._sums:
            sums = torch.stack(list(self._sums.values()))
            both = sum_over_processes(torch.stack([sums, sums.new_tensor(list(self._counts.values()))]))
            means = dict(zip(self._sums, (both[0] / both[1]).tolist(), strict=True))
        if self._error_and_rows is not None:
            for level, (error, rows) in enumerate(sum_over_processes(self._error_and_rows).tolist()):
                if rows > 0:
                    means[f"error_at/d=1_{2**level}"] = error / rows
        self._sums, self._counts, self._error_and_rows = {}, {}, None
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
