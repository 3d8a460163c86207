"""Ends a run that hangs and names the rank at fault, by the heartbeats that all ranks leave in a folder."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import tempfile
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
"""So much longer may the slow phases take, and everything in the first step, where compilation falls."""
SLOW = ("save", "evaluate")
FAILED = "failed.txt"
"""Holds the message of the first rank that failed."""
GRACE_S = 10.0
"""Seconds in which the others may end by their own errors once one has failed."""


class Beat(NamedTuple):
    """A rank's last heartbeat.

    Attributes:
        step, phase: where it is.
        at: when it came there, in seconds since 1970.
        allowed_s: seconds that it may stay there.
        host, pid: its process.
        left: None in the loop; FINISHED or the exception's name once it is out of it.
    """

    step: int
    phase: Phase
    at: float
    allowed_s: float
    host: str
    pid: int
    left: str | None = None


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its last beat."""
    return folder / f"rank_{rank:05d}.json"


def write_beat(path: Path, beat: Beat) -> None:
    """Replace a rank's file as a whole."""
    write_whole(path, json.dumps(beat._asdict()), durable=False)


def read_beat(path: Path) -> Beat | None:
    """A rank's last beat; None if it left none that can be read."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def clear_beats(folder: Path) -> None:
    """Remove what an earlier start of the job left; one rank does it, before any of them beats."""
    for path in [*folder.glob("rank_*.json"), *folder.glob("stack_rank_*.txt"), folder / FAILED]:
        with suppress(FileNotFoundError):
            path.unlink()
    remove_leftovers(folder, of_all=True)


def overdue(beats: Sequence[Beat | None], now: float) -> tuple[list[int], float]:
    """The ranks that hold up the others for longer than they may.

    These are among the ones furthest behind, whom the others wait for. A rank that is behind but moves holds up nobody.

    Args:
        beats: of every rank; None for one that left no sign of life.
        now: seconds since 1970.

    Returns:
        The ranks; and the seconds until the first of those furthest behind is overdue, 0 if one is.
    """
    places = [_place(beat) for beat in beats]
    behind = [rank for rank, place in enumerate(places) if place == min(places)]
    left_s = {rank: _seconds_left(beats[rank], now) for rank in behind}
    return [rank for rank in behind if left_s[rank] <= 0], max(0.0, min(left_s.values()))


def _place(beat: Beat | None) -> tuple[float, float]:
    if beat is None:
        return -1, -1
    if beat.left == FINISHED:
        return float("inf"), 0
    return beat.step, ORDER[beat.phase]


def _seconds_left(beat: Beat | None, now: float) -> float:
    # One that never came or that an exception ended is not worth waiting for.
    return 0.0 if beat is None or beat.left else beat.at + beat.allowed_s - now


def report_of(beats: Sequence[Beat | None], named: Sequence[int], now: float) -> str:
    """Who hangs and why it is named, then a line a rank."""
    who = f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(str(rank) for rank in named)}"
    lines = [f"HANG at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}: {who}: {_why(beats, named)}"]
    for rank, beat in enumerate(beats):
        mark = "  <--" if rank in named else ""
        if beat is None:
            lines.append(f"  rank {rank}: never started: no sign of life in its file{mark}")
            continue
        left = f", left the loop: {beat.left}" if beat.left else ""
        lines.append(
            f"  rank {rank}: step {beat.step}, {beat.phase}, {now - beat.at:.1f} s ago (allowed: {beat.allowed_s:g} s)"
            f"{left}, host {beat.host}, pid {beat.pid}{mark}"
        )
    return "\n".join(lines)


def _why(beats: Sequence[Beat | None], named: Sequence[int]) -> str:
    first = beats[named[0]]
    if first is None:
        return "never started: it has not reached its first step, and the others wait for it"
    where = f"in step {first.step}, {first.phase}"
    if first.left:
        return f"left the loop {where}, with {first.left}, and the others wait for it"
    if len(beats) == 1:
        return f"silent {where} for longer than allowed"
    if len({_place(beat) for beat in beats}) == 1:
        return f"all ranks are {where}, so none can be told from the others: compare their stacks"
    return f"furthest behind, {where}, and silent for longer than allowed; the others wait for it"


def stacks() -> str:
    """Where every thread of this process is."""
    with suppress(OSError), tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
    return "not to be had: no room for a temporary file"


class Heartbeat:
    """Ends this process with status 76 and a report when some rank no longer moves, so that a launcher can start anew.

    A thread writes ``rank_00003.json`` into the folder. When this rank has been silent for its time it reads the files
    of all: the ranks furthest behind in (step, phase) are those that the others wait for in a collective, and they
    hang if they have been silent for theirs. The report goes to standard error and ``hang.txt``, this rank's stack to
    standard error and ``stack_rank_00003.txt``. Should the thread itself be stuck, in the file system or for want of
    the interpreter's lock, then faulthandler prints the stacks after SLOW_FACTOR * timeout_s seconds and ends the
    process with status 1.

    Args:
        folder: shared by all ranks; one of them calls clear_beats before any beats. The clocks of the hosts must
            agree to well within timeout_s.
        rank: of this process.
        world_size: how many ranks there are.
        timeout_s: seconds without a beat; 0 switches it off. Many times what a phase usually takes.
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
        """Tell the other ranks at once that this one has failed; an exit callback for an ExitStack."""
        if self._thread is not None and kind is not None and not issubclass(kind, SystemExit):
            self._failed = True
            with suppress(OSError), (self._folder / FAILED).open("x") as file:
                file.write(f"rank {self._rank} failed: {kind.__name__}: {error}")

    def beat(self, step: int, phase: Phase) -> None:
        """This rank is alive and begins this phase; call it again within a long one. Costs less than 2 microseconds."""
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
                mine = self._mine()
                if mine is not None and (report := self._failure_of_another()):
                    return self._end(report)
                if mine is None or time.time() < max(look_at, mine.at + mine.allowed_s):
                    continue
                report, wait_s = self._look()
                if report:
                    return self._end(report)
                look_at = time.time() + wait_s
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _failure_of_another(self) -> str:
        """What another rank failed with a while ago, where this one still waits for it in a collective."""
        with suppress(OSError):
            path = self._folder / FAILED
            if not self._failed and time.time() - path.stat().st_mtime > GRACE_S:
                return path.read_text()
        return ""

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
                write_beat(beat_file(self._folder, self._rank), mine)

    def _look(self) -> tuple[str, float]:
        """The report, empty if nobody hangs; and the seconds after which to look again."""
        beats = [read_beat(beat_file(self._folder, rank)) for rank in range(self._world_size)]
        beats[self._rank] = self._mine()
        now = time.time()
        named, wait_s = overdue(beats, now)
        if named and self._rank not in named:
            # The rank at fault goes first: its stack is the one that is needed, and the launcher then ends the others.
            named, wait_s = overdue(beats, now - 2 * self._tick_s)
        return (report_of(beats, named, now) if named else ""), wait_s

    def _end(self, report: str) -> None:
        stack = f"stack of rank {self._rank}, pid {os.getpid()}:\n{stacks()}"
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
