"""Several processes that share one piece of work and meet in a folder, without a process group."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

PATIENCE = 30 * 60.0
"""Seconds without any change in the folder after which a process no longer waits for the others."""

SECONDS_BETWEEN_MESSAGES = 60.0


class Rank(NamedTuple):
    """Which of the processes that share the work this one is, and which of its machine's."""

    number: int = 0
    world_size: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Rank:
        """What ``torchrun`` says; alone without it.

        Raises:
            ValueError: if RANK does not lie below WORLD_SIZE, or one is no number.
        """
        number, world_size, local = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
        if not 0 <= number < world_size:
            raise ValueError(f"RANK must lie in 0 ... WORLD_SIZE - 1, got {number} of {world_size}")
        return cls(number, world_size, local)

    def device(self, wanted: str | None) -> torch.device:
        """The device to work on: the one asked for, else a GPU if there is one; the machine's ranks take one each.

        Raises:
            ValueError: if it is a GPU that this machine does not have.
        """
        name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise ValueError(f"there is no device {name!r}; known: cpu, cuda, cuda:NUMBER, mps")
        device = torch.device(name)
        if device.type != "cuda":
            return device
        device = torch.device("cuda", self.local if device.index is None else device.index)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index >= gpus:
            raise ValueError(
                f"device {device} was asked for and this machine has {gpus} GPUs: name another device, or start no "
                "more processes than there are GPUs"
            )
        return device


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}") from error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_for(folder: Path, missing: Callable[[], str]) -> None:
    """Wait until nothing is missing, for as long as anything in the folder still changes.

    Args:
        folder: that the processes share.
        missing: says what is missing, as in "2 shards, of rank 1, are"; empty when everything is there.

    Raises:
        TimeoutError: naming what is missing.
    """
    state, changed, told = _state(folder), time.monotonic(), time.monotonic()
    while what := missing():
        now = time.monotonic()
        if (seen := _state(folder)) != state:
            state, changed = seen, now
        elif now - changed > PATIENCE:
            raise TimeoutError(
                f"{folder}: nothing has changed for {PATIENCE:.0f} seconds, and {what} not there: start the same "
                "command again on all ranks; what is finished is kept"
            )
        if now - told > SECONDS_BETWEEN_MESSAGES:
            print(f"{folder}: {what} not there yet; waiting", file=sys.stderr)
            told = now
        time.sleep(0.2)


def _state(folder: Path) -> set[tuple[str, int]]:
    """Names and sizes of all files, also of the unfinished ones that other processes are writing."""
    found = set()
    for place, _, names in os.walk(folder):  # which does not mind a folder that goes away meanwhile
        for name in names:
            with suppress(FileNotFoundError):  # renamed in this moment
                found.add((os.path.join(place, name), os.path.getsize(os.path.join(place, name))))
    return found
