"""What a log line says: means over steps and processes, speed, memory, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shortcutflow.config import RunConfig
from shortcutflow.distributed import World
from shortcutflow.train.metrics import RunningMeans
from shortcutflow.train.parts import Parts
from shortcutflow.train.position import Position
from shortcutflow.train.speed import Stopwatch, peak_flops, peak_memory
from shortcutflow.types import LossReport


class Reporter:
    """Collects a run's numbers between two log lines.

    Args:
        config: the run.
        parts: whose stream knows of samples that could not be read.
        world: the processes of the run, all of which call :meth:`take` together.
        position: where its steps begin.
    """

    def __init__(self, config: RunConfig, parts: Parts, world: World, position: Position) -> None:
        self._position = position
        self._world, self._batch_size = world, config.training.global_batch_size
        self._means, self._stopwatch, self._optimizer = RunningMeans(), Stopwatch(), config.optimizer
        self._total_steps = config.training.steps
        self._norms: dict[str, float] = {}
        self._stream = parts.stream
        # A backward pass costs two forward ones.
        evaluations = 3 + config.objective.target_evaluations(self._batch_size)
        self._flops = parts.forward_flops * evaluations if parts.forward_flops is not None else None
        self._peak = peak_flops(world.device) if config.training.precision == "bfloat16" else None
        self._steps = 0

    def add(self, reports: Sequence[LossReport], grad_norm: Tensor, norms: dict[str, float]) -> None:
        """One step that was made: the losses of its parts, and norms if they were taken."""
        for report in reports:
            self._means.add(report, grad_norm=grad_norm)
        self._norms = norms

    def start_step(self) -> None:
        """A step begins: its data is asked for."""
        self._stopwatch.start_step()

    def got_data(self) -> None:
        """The data is here."""
        self._stopwatch.got_data()

    def end_step(self) -> None:
        """A step is over, made or skipped."""
        self._stopwatch.end_step()
        self._steps += 1

    def take(self, done: int, skipped_steps: int) -> dict[str, float]:
        """The numbers since the last call, by name.

        Args:
            done: optimizer steps so far.
            skipped_steps: so far.
        """
        numbers = self._means.take(self._world.sum) | self._norms
        here = self._stopwatch.take()
        images = self._steps * self._batch_size
        numbers |= {
            "lr": self._optimizer.lr_at(done - 1, self._total_steps),
            "skipped_steps": float(skipped_steps),
            "damaged_samples": float(len(self._stream.damaged)),
            "images_seen": self._position.images_at(done, self._batch_size),
            "images_per_second": images / here["seconds"],
            "data_waiting_share": here["data_waiting_share"],
            "slowest_step_seconds": here["slowest_step_seconds"],
            "memory_bytes": float(peak_memory(self._world.device)),
        }
        if self._world.size > 1:
            numbers |= self._over_ranks(here, numbers["memory_bytes"])
        if self._flops is not None:
            achieved = self._flops * numbers["images_per_second"] / self._world.size
            numbers["tflops_per_device"] = achieved / 1e12
            if self._peak is not None:
                numbers["model_flops_utilisation"] = achieved / self._peak
        self._norms, self._steps = {}, 0
        return numbers

    def _over_ranks(self, here: dict[str, float], memory: float) -> dict[str, float]:
        """Which rank had the slowest step, and the most of what each rank has of its own."""
        mine = torch.zeros(3, self._world.size, dtype=torch.float64)
        mine[:, self._world.rank] = torch.tensor([here["slowest_step_seconds"], here["data_waiting_share"], memory])
        # Over the device's group: the other one may be busy with a checkpoint.
        table = self._world.sum(mine.to(self._world.device, torch.float32)).cpu()
        return {
            "slowest_step_seconds": float(table[0].max()),
            "slowest_step_rank": float(table[0].argmax()),
            "data_waiting_share": float(table[1].max()),
            "memory_bytes": float(table[2].max()),
        }
