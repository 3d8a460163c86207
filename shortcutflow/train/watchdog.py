"""Ends a run that hangs and names the rank at fault, told from the signs of life that all ranks leave in a folder."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from shortcutflow.train import hang
from shortcutflow.train.hang import Beat, Phase, beat_file

HANG_EXIT_CODE = 76
SLOW_FACTOR = 10
"""So much longer may the slow phases take, and everything in the first step, where compilation falls."""
SLOW = ("save", "evaluate")


class Watchdog:
    """Ends this process with status 76 and a report when some rank no longer moves, so that a launcher can start anew.

    A thread writes ``rank_00003.json`` into the folder. When this rank has been silent for its time it reads the files
    of all: the ranks furthest behind in (step, phase) are those that the others wait for in a collective, and they
    hang if they have been silent for theirs. The report goes to standard error and ``hang.txt``, this rank's stack to
    standard error and ``stack_rank_00003.txt``. Should the thread itself be stuck, in the file system or for want of
    the interpreter's lock, then faulthandler prints the stacks after SLOW_FACTOR * timeout_s seconds and ends the
    process with status 1.

    Args:
        folder: shared by all ranks; one of them calls clear_beats before any enters. The clocks of the hosts must
            agree to well within timeout_s.
        rank: of this process.
        world_size: how many ranks there are.
        timeout_s: seconds without a beat; 0 switches the watchdog off. Many times what a phase usually takes.
        on_hang: called with the report in place of the exit, once.

    Raises:
        ValueError: for a negative or infinite timeout_s or rank outside the world; from ``beat`` for an unknown phase.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, timeout_s: float, on_hang: Callable[[str], None] | None = None
    ) -> None:
        if not 0 <= timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}; give the seconds that a phase may take at most, or 0 for none")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; it must be 0 ... {world_size - 1}")
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._timeout_s, self._on_hang = timeout_s, on_hang
        # All ranks together write about 100 files a second at most, which a shared file system bears.
        self._tick_s = min(max(1.0, world_size / 100), timeout_s / 4)
        self._first_step: int | None = None
        # One tuple, replaced as a whole, so that the thread never sees half a beat.
        self._last: tuple[int, Phase, float] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout_s > 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        # A thread that still runs is stuck in the file system, and so would this one be.
        if not self._thread.is_alive():
            self._write(hang.FINISHED if kind is None else kind.__name__)

    def beat(self, step: int, phase: Phase) -> None:
        """This rank is alive and begins this phase; call it again within a long one. Costs less than 2 microseconds."""
        if phase not in hang.ORDER:
            raise ValueError(f"unknown phase {phase!r}; known: {', '.join(hang.ORDER)}")
        if self._first_step is None:
            self._first_step = step
        self._last = step, phase, time.monotonic()

    def _watch(self) -> None:
        written: tuple[int, Phase, float] | None = None
        look_at = 0.0
        try:
            while not self._ended.wait(self._tick_s):
                if self._on_hang is None and sys.__stderr__ is not None:
                    faulthandler.dump_traceback_later(SLOW_FACTOR * self._timeout_s, exit=True, file=sys.__stderr__)
                if self._last is not written:
                    written = self._last
                    self._write()
                mine = self._mine()
                if mine is None or time.time() < max(look_at, mine.at + mine.allowed_s):
                    continue
                report, wait_s = self._look()
                if report:
                    return self._end(report)
                look_at = time.time() + wait_s
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _mine(self, left: str | None = None) -> Beat | None:
        if self._last is None:
            return None
        step, phase, at = self._last
        allowed_s = self._timeout_s * (SLOW_FACTOR if phase in SLOW or step == self._first_step else 1)
        # Taken by the monotonic clock, told by the one that all hosts share.
        at = time.time() - (time.monotonic() - at)
        return Beat(step, phase, at, allowed_s, socket.gethostname(), os.getpid(), left)

    def _write(self, left: str | None = None) -> None:
        mine = self._mine(left)
        if mine is not None:
            # A full disk is no reason to end training.
            with suppress(OSError):
                hang.write_beat(beat_file(self._folder, self._rank), mine)

    def _look(self) -> tuple[str, float]:
        """The report, empty if nobody hangs; and the seconds after which to look again."""
        beats = [hang.read_beat(beat_file(self._folder, rank)) for rank in range(self._world_size)]
        beats[self._rank] = self._mine()
        now = time.time()
        named, wait_s = hang.overdue(beats, now)
        if named and self._rank not in named:
            # The rank at fault goes first: its stack is the one that is needed, and the launcher then ends the others.
            named, wait_s = hang.overdue(beats, now - 2 * self._tick_s)
        return (hang.report_of(beats, named, now) if named else ""), wait_s

    def _end(self, report: str) -> None:
        stack = f"stack of rank {self._rank}, pid {os.getpid()}:\n{hang.stacks()}"
        report += f"\n  stacks of the ranks that noticed: {self._folder}/stack_rank_*.txt"
        with suppress(OSError):
            (self._folder / f"stack_rank_{self._rank:05d}.txt").write_text(stack)
            (self._folder / "hang.txt").write_text(report + "\n")
        try:
            print(f"{report}\n{stack}", file=sys.stderr, flush=True)
        finally:
            (self._on_hang or _exit)(report)


def _exit(report: str) -> None:
    os._exit(HANG_EXIT_CODE)
