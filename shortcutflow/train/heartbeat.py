"""Ends a run that hangs and names the rank at fault, by the heartbeats that all ranks leave in a folder."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

from shortcutflow.io.atomic import remove_leftovers, write_whole

Phase = Literal["data", "objective", "backward", "step", "log", "save", "evaluate"]
"""What a rank does within a step, in this order: a rank in an earlier phase is behind one in a later."""

ORDER = {phase: index for index, phase in enumerate(get_args(Phase))}
FINISHED = "finished"
HANG_EXIT_CODE = 76
SLOW_FACTOR = 10
"""The slow phases, and everything in the first step, where compilation falls, may take this many timeouts."""
SLOW = ("save", "evaluate")
FAILED = "failed.txt"
"""Holds the message of the first rank that failed."""
GRACE_S = 10.0
"""Seconds in which the other ranks may end by their own errors once one has failed."""


class Beat(NamedTuple):
    """A rank's last heartbeat.

    Attributes:
        step, phase: where the rank is.
        time: when that began, in seconds since 1970.
        allowed_s: seconds that it may last.
        host, pid: the rank's process.
        exit: None in the loop; FINISHED or the exception's name after it.
    """

    step: int
    phase: Phase
    time: float
    allowed_s: float
    host: str
    pid: int
    exit: str | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Sorts ranks by how far they are; a finished one is ahead of all."""
        return (float("inf"), 0) if self.exit == FINISHED else (self.step, ORDER[self.phase])


def beat_file(folder: Path, rank: int) -> Path:
    """The file of a rank's last beat."""
    return folder / f"rank_{rank:05d}.json"


def write_beat(path: Path, beat: Beat) -> None:
    """Replace a rank's file as a whole."""
    write_whole(path, json.dumps(beat._asdict()), durable=False)


def read_beat(path: Path) -> Beat | None:
    """A rank's last beat; None if there is none that can be read."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def clear_beats(folder: Path) -> None:
    """Remove the files of an earlier start of the job; rank 0 does it, before any rank beats."""
    for path in [*folder.glob("rank_*.json"), *folder.glob("stack_rank_*.txt"), folder / FAILED]:
        path.unlink(missing_ok=True)
    remove_leftovers(folder, of_all=True)


def overdue(beats: Sequence[Beat | None], now: float) -> tuple[list[int], float]:
    """The ranks that hold up the others for longer than allowed.

    These are among the ones furthest behind, for which the others wait. A rank that is behind but moves is not one.

    Args:
        beats: of every rank; None for one that never wrote any.
        now: seconds since 1970.

    Returns:
        The ranks; and the seconds until the first of those furthest behind is overdue, 0 if one is.
    """
    order = [(-1, -1) if beat is None else beat.order for beat in beats]
    # A rank may have waited in a collective for a slow one that has just passed it.
    passed_at = max((beat.time for beat in beats if beat is not None and beat.order > min(order)), default=0.0)
    left_s = {
        rank: _seconds_left(beats[rank], passed_at, now) for rank, place in enumerate(order) if place == min(order)
    }
    return [rank for rank, left in left_s.items() if left <= 0], max(0.0, min(left_s.values()))


def _seconds_left(beat: Beat | None, passed_at: float, now: float) -> float:
    # There is nothing to wait for in a rank that never came or that an exception ended.
    return 0.0 if beat is None or beat.exit else max(beat.time, passed_at) + beat.allowed_s - now


def report_of(beats: Sequence[Beat | None], named: Sequence[int], now: float) -> str:
    """Which ranks hang and why they are named, then a line a rank."""
    if len(beats) == 1:
        why = "silent for longer than allowed"
    elif None not in beats and len({beat.order for beat in beats if beat is not None}) == 1:
        why = "all ranks are there, so the heartbeats do not tell which is at fault: compare their stacks"
    else:
        why = "furthest behind, and the others wait for it"
    ranks = f"rank{'s' * (len(named) > 1)} {', '.join(map(str, named))}"
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    lines = [f"HANG at {at}: {ranks}: {_where(beats[named[0]])}: {why}"]
    for rank, beat in enumerate(beats):
        line = f"  rank {rank}: {_where(beat)}"
        if beat is not None:
            line += f", {now - beat.time:.1f} s ago (allowed: {beat.allowed_s:g} s), host {beat.host}, pid {beat.pid}"
        lines.append(line + "  <--" * (rank in named))
    return "\n".join(lines)


def _where(beat: Beat | None) -> str:
    if beat is None:
        return "never started, or has not reached its first step"
    return f"step {beat.step}, {beat.phase}" + (f", left the loop with {beat.exit}" if beat.exit else "")


class Heartbeat:
    """Ends this process with status 76 and a report when some rank no longer moves, so that a launcher can restart it.

    A thread writes ``rank_00003.json`` into the folder. When this rank has been silent for its time it reads the files
    of all ranks: those furthest behind in (step, phase) are the ones for which the others wait in a collective, and
    they hang if they have been silent for their time. The report goes to standard error and ``hang.txt``, this rank's
    stacks to standard error and ``stack_rank_00003.txt``. Should the thread itself be stuck, in the file system or for
    want of the interpreter's lock, then faulthandler prints the stacks after SLOW_FACTOR * timeout_s seconds and ends
    the process with status 1.

    Args:
        folder: shared by all ranks; one of them calls clear_beats before any beats. The clocks of the hosts must
            agree to well within timeout_s.
        rank, world_size: of this process.
        timeout_s: seconds without a beat; 0 switches it off. Many times the usual length of a phase.
        on_hang: called with the report in place of the exit, once.

    Raises:
        ValueError: for a negative or infinite timeout_s or a rank outside the world; from ``beat`` for an unknown
            phase.
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
        # One tuple, replaced as a whole, so that the thread never sees half a beat: step, phase, monotonic seconds.
        self._last: tuple[int, Phase, float] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = False

    def __enter__(self) -> Heartbeat:
        self.start()
        return self

    def start(self) -> None:
        """Begin to watch."""
        if self._timeout_s > 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        # A thread that still runs is stuck in the file system, and so would this one be.
        if not self._thread.is_alive():
            self._write(FINISHED if kind is None else kind.__name__)

    def failed(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Report to the other ranks at once that this one has failed; an exit callback for an ExitStack."""
        if self._thread is not None and kind is not None and not issubclass(kind, SystemExit):
            self._failed = True
            with suppress(OSError), (self._folder / FAILED).open("x") as file:
                file.write(f"rank {self._rank} failed: {kind.__name__}: {error}")

    def beat(self, step: int, phase: Phase) -> None:
        """This rank begins this phase; call it again within a long one. Costs less than 2 microseconds."""
        if phase not in ORDER:
            raise ValueError(f"unknown phase {phase!r}; known: {', '.join(ORDER)}")
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
                own = self._own()
                if own is None:
                    continue
                report = self._failure_of_another()
                if not report and time.time() >= max(look_at, own.time + own.allowed_s):
                    report, wait_s = self._look()
                    look_at = time.time() + wait_s
                if report:
                    return self._end(report)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _failure_of_another(self) -> str:
        """The error of another rank, where this one has waited for it in a collective for a while."""
        with suppress(OSError):
            path = self._folder / FAILED
            if not self._failed and time.time() - path.stat().st_mtime > GRACE_S:
                return path.read_text()
        return ""

    def _own(self, exit: str | None = None) -> Beat | None:
        if self._last is None:
            return None
        step, phase, at = self._last
        allowed_s = self._timeout_s * (SLOW_FACTOR if phase in SLOW or step == self._first_step else 1)
        # Measured by the monotonic clock, written by the one that all hosts share.
        return Beat(
            step, phase, time.time() - time.monotonic() + at, allowed_s, socket.gethostname(), os.getpid(), exit
        )

    def _write(self, exit: str | None = None) -> None:
        own = self._own(exit)
        if own is not None:
            # A full disk is no reason to end training.
            with suppress(OSError):
                write_beat(beat_file(self._folder, self._rank), own)

    def _look(self) -> tuple[str, float]:
        """The report, empty if no rank hangs; and the seconds after which to look again."""
        beats = [read_beat(beat_file(self._folder, rank)) for rank in range(self._world_size)]
        beats[self._rank] = self._own()
        now = time.time()
        named, wait_s = overdue(beats, now)
        if named and self._rank not in named:
            # The rank at fault goes first: its stack is the one that matters, and the launcher then ends the others.
            named, wait_s = overdue(beats, now - 2 * self._tick_s)
        return (report_of(beats, named, now) if named else ""), wait_s

    def _end(self, report: str) -> None:
        report += f"\n  stacks of the ranks that noticed: {self._folder}/stack_rank_*.txt"
        with suppress(OSError), (self._folder / f"stack_rank_{self._rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
            (self._folder / "hang.txt").write_text(report + "\n")
        try:
            print(f"{report}\nstacks of rank {self._rank}, pid {os.getpid()}:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
        finally:
            (self._on_hang or _exit)(report)


def _exit(report: str) -> None:
    os._exit(HANG_EXIT_CODE)
