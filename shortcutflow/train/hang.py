"""Which rank hangs, told from every rank's last sign of life; files and arithmetic, no threads."""

from __future__ import annotations

import faulthandler
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from shortcutflow.io.atomic import remove_leftovers, write_whole

Phase = Literal["data", "objective", "backward", "step", "log", "save", "evaluate"]
"""What a rank does within a step, in this order: a rank in an earlier phase is behind one in a later."""

ORDER = {phase: index for index, phase in enumerate(get_args(Phase))}
FINISHED = "finished"


class Beat(NamedTuple):
    """A rank's last sign of life.

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
    """Remove what an earlier start of the job left; one rank does it, before the others may enter the watchdog."""
    for path in [*folder.glob("rank_*.json"), *folder.glob("stack_rank_*.txt")]:
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
