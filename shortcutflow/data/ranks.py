"""Several processes that share one piece of work through a folder, without a process group."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE = 30 * 60.0
"""Seconds without any change in the folder after which a process no longer waits for the others."""

SECONDS_BETWEEN_MESSAGES = 60.0


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
