"""``shortcutflow prepare`` killed, interrupted and called twice at once: no stop changes a byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shortcutflow.data.prepare import WorkerDiedError, prepare
from tests.data.pictures import CLASSES, files_of, picture, pictures, write_files

PACKAGE_ROOT = str(Path(__file__).parents[2])
HOLD = """import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 3)
print(flush=True)
time.sleep(100)"""


def command(source: Path, folder: Path, workers: int = 2) -> list[str]:
    return [
        sys.executable, "-m", "tests.data.run_prepare", str(source), str(folder), "--size", "32",
        "--samples-per-shard", "7", "--workers", str(workers),
    ]  # fmt: skip


def started(source: Path, folder: Path, workers: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(source, folder, workers), cwd=PACKAGE_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def parents() -> dict[int, int]:
    """The parent of every process that runs; nothing where there is no /proc."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (process / "stat").read_text().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(process.name)] = int(parent)
    return found


def descendants(process: int) -> set[int]:
    family, found = parents(), {process}
    while more := {child for child, parent in family.items() if parent in found} - found:
        found |= more
    return found - {process}


def wait_until(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def large_pictures(root: Path) -> Path:
    """Slow enough to encode that a kill meets a half-written shard."""
    files = {f"{CLASSES[i % 3]}/{i:02d}.jpg": picture(i, (400, 400)) for i in range(60)}
    return write_files(root, files | {"ant/bad.jpg": b"no picture"})


def kill_and_continue(tmp_path: Path, kills: int, seed: int) -> None:
    source = large_pictures(tmp_path / "raw")
    prepare(source, tmp_path / "whole", size=32, samples_per_shard=7, workers=0, progress=False)
    whole, rng = files_of(tmp_path / "whole"), random.Random(seed)
    folder, stopped_midway = tmp_path / "killed", 0
    for _ in range(kills):
        kill_at_random(source, folder, rng)
        stopped_midway += not (folder / "manifest.json").exists()
        (folder / "manifest.json").unlink(missing_ok=True)
        there = sorted(folder.glob("shard-*"))
        if len(there) > 8:  # of 18 files; some go, tar or index or both, or there would soon be nothing left to stop
            for path in rng.sample(there, len(there) // 2):
                path.unlink()
    assert stopped_midway > kills // 2
    subprocess.run(command(source, folder), cwd=PACKAGE_ROOT, check=True, capture_output=True)
    assert files_of(folder) == whole


def kill_at_random(source: Path, folder: Path, rng: random.Random) -> None:
    """Start a preparation and kill its main process a moment after it began, or after it finished a few shards."""
    before = {path.name for path in folder.glob("*.index")}
    more = rng.randrange(3)

    def has_come_far() -> bool:
        names = {path.name for path in folder.glob("*.index")} | {path.name for path in folder.glob("*.json")}
        begun = bool(list(folder.glob(".shard-*"))) or "manifest.json" in names
        return process.poll() is not None or (begun and len(names - before) >= more)

    process = started(source, folder)
    wait_until(has_come_far, 60)
    time.sleep(rng.random() * 0.03)
    orphans = descendants(process.pid)
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not orphans & parents().keys())


def test_killed_and_continued_gives_the_same_bytes(tmp_path: Path) -> None:
    kill_and_continue(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    kill_and_continue(tmp_path, kills=20, seed=1)


def test_interrupt_says_how_to_continue(tmp_path: Path) -> None:
    source = large_pictures(tmp_path / "raw")
    folder = tmp_path / "out"
    process = started(source, folder)
    wait_until(lambda: (folder / "shard-000000.index").exists(), 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.skip("it was done before the interrupt came")
    assert process.returncode == 130
    assert "the same command continues" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not list(folder.glob(".*.unfinished-*"))


def test_two_at_once_share_the_work(tmp_path: Path) -> None:
    """Each writes shards that the other has not begun, waits for the rest, and says that the folder is complete."""
    source, folder = large_pictures(tmp_path / "raw"), tmp_path / "out"
    prepare(source, tmp_path / "whole", size=32, samples_per_shard=7, workers=0, progress=False)
    processes = [started(source, folder, workers=0) for _ in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "60 samples" in out
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_waits_for_a_shard_that_another_process_writes(tmp_path: Path) -> None:
    """It goes on once that is written, and writes it itself if that process is killed."""
    source, folder = large_pictures(tmp_path / "raw"), tmp_path / "out"
    prepare(source, folder, size=32, samples_per_shard=7, workers=0, progress=False)
    whole = files_of(folder)
    for name in ("manifest.json", "shard-000003.tar", "shard-000003.index"):
        (folder / name).unlink()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock-shards")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    process = started(source, folder, workers=0)
    assert process.stderr is not None
    assert any("another process is writing shard-000003.tar; waiting" in line for line in process.stderr)
    assert process.poll() is None
    holder.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert files_of(folder) == whole


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_files(tmp_path / "raw", pictures(5))
    monkeypatch.setattr("shortcutflow.data.prepare.read_image", lambda content: os._exit(9))
    with pytest.raises(WorkerDiedError, match="a worker process died"):
        prepare(raw, tmp_path / "out", size=8, workers=2, progress=False)
