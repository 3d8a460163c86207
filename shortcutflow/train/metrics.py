"""The numbers of a log line: means over steps and ranks, throughput, memory, norms."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shortcutflow.config import RunConfig
from shortcutflow.data.stream import BatchStream
from shortcutflow.distributed import World
from shortcutflow.train.resume import Position
from shortcutflow.types import LossReport, Mean

LEVELS = 32
"""Step sizes 1, 1/2, ... whose bootstrap errors are kept apart."""
PEAK_BFLOAT16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 FLOP/s by part of a GPU's name, from the makers' data sheets."""


class RunningMeans:
    """Means of the metrics since the last log line, and of the bootstrap error by step size."""

    def __init__(self) -> None:
        self._sums: dict[str, Mean] = {}
        # Sums of errors and numbers of rows by step size, smallest first, and the sizes between two of them; made on
        # the device of the first report.
        self._error_and_rows: Tensor | None = None
        self._between: Tensor | None = None

    def add(self, report: LossReport, **more: Tensor) -> None:
        """Add one part's report; nothing is read back from the device."""
        n, d = report.targets.n_bootstrap, report.targets.d
        means = report.means | {name: Mean(value) for name, value in more.items()}
        for name, mean in means.items():
            before = self._sums.get(name)
            total = torch.zeros((), device=d.device) if before is None else before.total
            self._sums[name] = Mean(total, mean.rows if before is None else before.rows + mean.rows, mean.root)
        torch._foreach_add_([self._sums[name].total for name in means], [mean.total.float() for mean in means.values()])
        if self._between is None:
            self._between = 2.0 ** (0.5 - torch.arange(LEVELS - 1, 0, -1, device=d.device))
        if self._error_and_rows is None:
            self._error_and_rows = torch.zeros(LEVELS, 2, device=d.device)
        error, size = report.row_loss[:n].float(), torch.bucketize(d[:n].contiguous(), self._between)
        self._error_and_rows.index_add_(0, size, torch.stack([error, torch.ones_like(error)], dim=1))

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means so far, over all ranks, by name; then start anew. Metrics without a row anywhere are left out.

        ``error_at/d=1_64`` is the bootstrap error at step size 1/64.
        """
        if self._error_and_rows is None:
            return {}
        # One exchange, and one wait: every rank has the same names, whatever rows its slice of the batch holds.
        sums = torch.stack([mean.total for mean in self._sums.values()])
        rows = sums.new_tensor([mean.rows for mean in self._sums.values()])
        table = sum_over_ranks(torch.cat([torch.stack([sums, rows], dim=1), self._error_and_rows])).tolist()
        means = {}
        for (name, mean), (total, count) in zip(self._sums.items(), table, strict=False):
            if count > 0:
                means[name] = math.sqrt(total / count) if mean.root and total >= 0 else total / count
        for level, (error, count) in enumerate(reversed(table[len(self._sums) :])):
            if count > 0:
                means[f"error_at/d=1_{2**level}"] = error / count
        self._sums, self._error_and_rows = {}, None
        return means


class MetricLogger:
    """Collects a run's numbers between two log lines.

    Args:
        config: the run.
        stream: counts the samples that could not be read.
        world: the ranks of the run, all of which call :meth:`take` together.
        position: where the run's steps begin.
        flops: floating-point operations of the network on one sample; None if unknown.
    """

    def __init__(
        self, config: RunConfig, stream: BatchStream, world: World, position: Position, flops: int | None
    ) -> None:
        self._config, self._stream, self._world, self._position = config, stream, world, position
        self._batch_size = config.training.global_batch_size
        # A backward pass costs two forward ones.
        evaluations = 3 + config.objective.target_evaluations(self._batch_size)
        self._flops = flops * evaluations if flops is not None else None
        self._peak = peak_flops(world.device) if config.training.precision == "bfloat16" else None
        self._means = RunningMeans()
        self._begin = self._step_begin = time.perf_counter()
        self._reset(self._begin)

    def _reset(self, now: float) -> None:
        self._begin, self._data_seconds, self._slowest, self._steps = now, 0.0, 0.0, 0
        self._norms: dict[str, float] = {}

    def start_step(self) -> None:
        """A step begins by waiting for data."""
        self._step_begin = time.perf_counter()

    def got_data(self) -> None:
        """The data is there."""
        self._data_seconds += time.perf_counter() - self._step_begin

    def add(self, reports: Sequence[LossReport], grad_norm: Tensor, norms: dict[str, float]) -> None:
        """Add a step that was not skipped: its losses, and norms if they were measured."""
        for report in reports:
            self._means.add(report, grad_norm=grad_norm)
        self._norms = norms

    def end_step(self) -> None:
        """A step is over, skipped or not."""
        self._slowest = max(self._slowest, time.perf_counter() - self._step_begin)
        self._steps += 1

    def take(self, done: int, skipped_steps: int) -> dict[str, float]:
        """The numbers since the last call, by name, after ``done`` optimizer steps, so many of them skipped."""
        now = time.perf_counter()
        images_per_second = self._steps * self._batch_size / (now - self._begin)
        numbers = self._means.take(self._world.sum) | self._norms
        numbers |= {
            "lr": self._config.optimizer.lr_at(done - 1, self._config.training.steps),
            "skipped_steps": float(skipped_steps),
            "damaged_samples": float(len(self._stream.damaged)),
            "images_seen": self._position.images_at(done, self._batch_size),
            "images_per_second": images_per_second,
        }
        waiting_share = self._data_seconds / max(now - self._begin, 1e-9)
        numbers |= self._largest_of_ranks(waiting_share, self._slowest, float(peak_memory(self._world.device)))
        if self._flops is not None:
            achieved = self._flops * images_per_second / self._world.size
            numbers["tflops_per_device"] = achieved / 1e12
            if self._peak is not None:
                numbers["model_flops_utilisation"] = achieved / self._peak
        self._reset(now)
        return numbers

    def _largest_of_ranks(self, waiting_share: float, slowest: float, memory: float) -> dict[str, float]:
        table = torch.zeros(3, self._world.size, dtype=torch.float64)
        table[:, self._world.rank] = torch.tensor([waiting_share, slowest, memory])
        if self._world.size > 1:
            # Over the device's group: the other one may be busy with a checkpoint.
            table = self._world.sum(table.to(self._world.device, torch.float32)).cpu()
        waiting_share, slowest, memory = table.max(dim=1).values.tolist()
        numbers = {"data_waiting_share": waiting_share, "slowest_step_seconds": slowest, "memory_bytes": memory}
        if self._world.size > 1:
            numbers["slowest_step_rank"] = float(table[1].argmax())
        return numbers


def forward_flops(network: nn.Module, num_classes: int | None) -> int | None:
    """Floating-point operations of a forward pass on one sample; None for a network that does not count its own.

    Call it before the network is sharded or compiled.
    """
    if not hasattr(network, "flops"):
        return None
    y = torch.zeros(1, dtype=torch.int64) if num_classes is not None else None
    try:
        return network.flops(y=y)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        # A network may need conditions of a kind that is not known here; that is no reason to stop a run.
        return None


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BFLOAT16.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
