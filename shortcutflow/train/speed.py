"""How fast a run is: where its time goes, and what share of the device's arithmetic it uses."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import nn

PEAK_BFLOAT16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 FLOP/s by part of a GPU's name, from the makers' data sheets."""


class Stopwatch:
    """Times of the steps since the last :meth:`take`."""

    def __init__(self) -> None:
        self._begin = self._step_begin = time.perf_counter()
        self._data = self._slowest = 0.0

    def start_step(self) -> None:
        """A step begins: its data is asked for."""
        self._step_begin = time.perf_counter()

    def got_data(self) -> None:
        """The data is here."""
        self._data += time.perf_counter() - self._step_begin

    def end_step(self) -> None:
        """The step is done."""
        self._slowest = max(self._slowest, time.perf_counter() - self._step_begin)

    def take(self) -> dict[str, float]:
        """Seconds since the last call, of the slowest step, and share of the time spent waiting for data."""
        now = time.perf_counter()
        taken = {
            "seconds": now - self._begin,
            "slowest_step_seconds": self._slowest,
            "data_waiting_share": self._data / max(now - self._begin, 1e-9),
        }
        self._begin, self._data, self._slowest = now, 0.0, 0.0
        return taken


def forward_flops(network: nn.Module, num_classes: int | None) -> int | None:
    """Floating-point operations of a forward pass on one sample; None for a network that does not count its own.

    Ask before it is sharded or compiled.
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
