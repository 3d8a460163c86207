"""The heartbeat names the rank that holds up the others, and nobody while all move."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path
from typing import Any

import pytest

from shortcutflow.train import heartbeat
from shortcutflow.train.heartbeat import (
    FINISHED,
    HANG_EXIT_CODE,
    SLOW_FACTOR,
    Beat,
    Heartbeat,
    clear_beats,
    overdue,
    report_of,
)

# The package without its __init__, which would load torch: these processes start in no time.
PRELUDE = f"""
import sys, time, types
from pathlib import Path
package = types.ModuleType("shortcutflow")
package.__path__ = [{str(Path(heartbeat.__file__).parents[1])!r}]
sys.modules["shortcutflow"] = package
from shortcutflow.train import heartbeat
from shortcutflow.train.heartbeat import Heartbeat
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
"""
# Backward waits for the other rank's mark, as a collective does.
RANK = """
def wait_for_both(step):
    (folder / f"mark_{step}_{rank}").touch()
    while not (folder / f"mark_{step}_{1 - rank}").exists():
        time.sleep(0.01)

def sleeps_here():
    time.sleep(60)

with Heartbeat(folder, rank, 2, 1.0) as dog:
    for step in range(3):
        dog.beat(step, "data")
        if rank == 1 and step == 2:
            sleeps_here()
        dog.beat(step, "backward")
        wait_for_both(step)
"""


def start(code: str, folder: Path, rank: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", PRELUDE + code, str(folder), str(rank)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and standard error; a process that does not end by itself fails the test."""
    try:
        _, said = process.communicate(timeout=15)
    finally:
        process.kill()
    return process.returncode, said


def beat(step: int, phase: Any, at: float, left: str | None = None, allowed_s: float = 10) -> Beat:
    return Beat(step, phase, at, allowed_s, "host", 1, left)


def test_two_processes_one_sleeps_in_data(tmp_path: Path) -> None:
    ranks = [start(RANK, tmp_path, rank) for rank in range(2)]
    (code_0, said_0), (code_1, said_1) = [outcome(process) for process in ranks]
    assert code_0 == code_1 == HANG_EXIT_CODE == 76
    for said in (said_0, said_1, (tmp_path / "hang.txt").read_text()):
        assert ": rank 1: step 2, data: furthest behind" in said
        table = [line for line in said.splitlines() if line.startswith("  rank ")]
        assert table[0].startswith("  rank 0: step 2, backward")
        assert "<--" not in table[0]
        assert table[1].startswith("  rank 1: step 2, data")
        assert table[1].endswith("<--")
    # Each rank tells where it is itself.
    assert "wait_for_both" in said_0
    assert "sleeps_here" in (tmp_path / "stack_rank_00001.txt").read_text()
    assert "sleeps_here" not in said_0


def test_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    code, said = outcome(start(RANK.replace("range(3)", "(0, 1)").replace("1.0", "0.1"), tmp_path, 0))
    assert code == HANG_EXIT_CODE
    assert ": rank 1: never started" in said


def test_stuck_thread_is_ended_too(tmp_path: Path) -> None:
    """The folder's file system no longer answers: the stacks are still printed and the process still ends."""
    stuck = """
heartbeat.write_beat = lambda path, beat: time.sleep(60)
with Heartbeat(folder, 0, 1, 0.1) as dog:
    dog.beat(0, "data")
    time.sleep(60)
"""
    code, said = outcome(start(stuck, tmp_path, 0))
    assert code == 1
    assert "Timeout" in said
    assert "_write" in said


def run_slowly(tmp_path: Path, timeout_s: float, pause_s: float) -> list[str]:
    """Two ranks in two threads: rank 1 pauses before each beat, rank 0 waits for it each step. Gives the reports."""
    reports: list[str] = []
    meet = threading.Barrier(2)

    def rank(number: int) -> None:
        with Heartbeat(tmp_path, number, 2, timeout_s, reports.append) as dog:
            for step in range(2):
                for phase in ("data", "objective", "backward"):
                    time.sleep(pause_s * number)
                    dog.beat(step, phase)
                meet.wait()
            # Nobody leaves before the last look: a finished rank is not waited for.
            meet.wait()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


def test_slow_but_sure_is_no_hang(tmp_path: Path) -> None:
    """Rank 0 is silent for 1.5 s at a time and may be for 1 s, but rank 1 moves every 0.5 s."""
    assert run_slowly(tmp_path, timeout_s=1.0, pause_s=0.5) == []


def test_negative_control_too_slow_is_a_hang(tmp_path: Path) -> None:
    reports = run_slowly(tmp_path, timeout_s=0.2, pause_s=0.5)
    assert reports
    assert all(": rank 1: " in report for report in reports)


@pytest.mark.parametrize("phase", ["save", "evaluate", "backward"])
def test_slow_phases_have_longer(tmp_path: Path, phase: Any) -> None:
    """0.6 s at 0.1 s allowed: a hang in backward, none while saving or evaluating."""
    assert SLOW_FACTOR == 10
    reports: list[str] = []
    with Heartbeat(tmp_path, 0, 1, 0.1, reports.append) as dog:
        dog.beat(0, "data")
        dog.beat(1, phase)
        time.sleep(0.6)
    assert len(reports) == (phase == "backward")


def test_first_step_has_longer(tmp_path: Path) -> None:
    reports: list[str] = []
    with Heartbeat(tmp_path, 0, 1, 0.1, reports.append) as dog:
        dog.beat(40, "backward")  # resumed at step 40, and compiling
        time.sleep(0.6)
    assert reports == []


def test_switched_off(tmp_path: Path) -> None:
    before = threading.active_count()
    with Heartbeat(tmp_path / "none", 0, 1, 0) as dog:
        dog.beat(0, "data")
        assert threading.active_count() == before
    assert not (tmp_path / "none").exists()


def test_file_is_written_only_on_change_and_ends_finished(tmp_path: Path) -> None:
    path = tmp_path / "rank_00003.json"
    with Heartbeat(tmp_path, 3, 4, 2.0, print) as dog:
        for step in range(20_000):
            dog.beat(step, "log")
        time.sleep(0.8)
        first = path.stat()
        assert json.loads(path.read_text())["step"] == 19_999
        time.sleep(0.8)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert json.loads(path.read_text())["exit"] == FINISHED
    clear_beats(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_beat_costs_less_than_two_microseconds(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 0, 1, 60) as dog:
        seconds = min(timeit.repeat(lambda: dog.beat(5, "backward"), number=10_000, repeat=10)) / 10_000
    assert seconds < 2e-6


CASES: dict[str, tuple[list[Beat | None], list[int]]] = {
    "earlier_phase": ([beat(7, "backward", 0), beat(7, "data", 0)], [1]),
    "earlier_step_counts_before_phase": ([beat(6, "evaluate", 0), beat(7, "data", 0)], [0]),
    "two_at_fault": ([beat(7, "data", 0), beat(7, "step", 0), beat(7, "data", 0)], [0, 2]),
    "behind_but_moving": ([beat(7, "backward", 0), beat(7, "data", 95)], []),
    "behind_in_a_slow_phase": ([beat(7, "data", 0), beat(6, "save", 0, allowed_s=200)], []),
    "only_the_silent_one_of_those_behind": ([beat(7, "data", 95), beat(7, "data", 0), beat(7, "step", 0)], [1]),
    "never_started": ([beat(7, "data", 0), None], [1]),
    "all_at_one_place": ([beat(7, "backward", 0), beat(7, "backward", 0)], [0, 1]),
    "finished_rank_is_not_waited_for": ([beat(7, "evaluate", 0), beat(7, "log", 0, FINISHED)], [0]),
    "waited_for_one_that_has_just_passed": ([beat(7, "backward", 0), beat(7, "step", 99)], []),
    "waited_for_one_that_has_just_finished": ([beat(7, "backward", 0), beat(7, "backward", 99, FINISHED)], []),
    "rank_that_failed_is": ([beat(7, "step", 0), beat(7, "data", 99, "ValueError")], [1]),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_named(case: str) -> None:
    beats, named = CASES[case]
    assert overdue(beats, now=100)[0] == named
    if named:
        table = report_of(beats, named, now=100).splitlines()[1:]
        assert [rank for rank, line in enumerate(table) if line.endswith("<--")] == named


def test_the_rank_at_fault_speaks_first(tmp_path: Path) -> None:
    """The others wait two ticks of 0.25 s more, or its stack might be lost when the launcher ends all."""
    dog = Heartbeat(tmp_path, 0, 2, 1.0)
    dog._last = 7, "backward", time.monotonic() - 20
    heartbeat.write_beat(tmp_path / "rank_00001.json", beat(7, "data", time.time() - 10.1))
    report, wait_s = dog._look()
    assert report == ""
    assert 0 < wait_s <= 0.4
    heartbeat.write_beat(tmp_path / "rank_00001.json", beat(7, "data", time.time() - 10.6))
    assert ": rank 1: " in dog._look()[0]


def test_seconds_until_the_next_look() -> None:
    assert overdue([beat(7, "step", 0), beat(7, "data", 95)], now=100) == ([], 5.0)


def test_report_says_when_no_rank_can_be_named() -> None:
    assert "compare their stacks" in report_of([beat(7, "data", 0)] * 2, [0, 1], now=100)
    assert "with ValueError" in report_of([beat(7, "step", 0), beat(7, "data", 0, "ValueError")], [1], now=100)


def test_impossible_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timeout_s is -1"):
        Heartbeat(tmp_path, 0, 1, -1)
    with pytest.raises(ValueError, match=r"rank is 2 of 2; it must be 0 \.\.\. 1"):
        Heartbeat(tmp_path, 2, 2, 1)
    with pytest.raises(ValueError, match="unknown phase 'forward'; known: data, objective"):
        Heartbeat(tmp_path, 0, 1, 0).beat(0, "forward")  # type: ignore[arg-type]


def test_a_failure_ends_the_others_long_before_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits in a collective that rank 1, which failed, will never enter; the report has rank 1's message."""
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.1)
    reports: list[str] = []
    with Heartbeat(tmp_path, 0, 2, 60.0, reports.append) as waiting:
        waiting.beat(1, "backward")
        failing = Heartbeat(tmp_path, 1, 2, 60.0)
        with failing:
            failing.beat(1, "data")
            failing.failed(ZeroDivisionError, ZeroDivisionError("a defect"), None)
        time.sleep(2.5)
    assert len(reports) == 1
    assert reports[0].startswith("rank 1 failed: ZeroDivisionError: a defect")
    clear_beats(tmp_path)
    assert not (tmp_path / heartbeat.FAILED).exists(), "an attempt does not see the failure of the one before"
