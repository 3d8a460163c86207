"""Runs that are killed and continued are, bit for bit, those that never were."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import pytest
import torch

from shortcutflow import checkpoint, cli
from shortcutflow.train.loggers import read_metrics
from shortcutflow.train.loop import train
from shortcutflow.train.signals import STOPPED_EXIT_CODE
from tests.processes import PATIENCE, forked, run_forked
from tests.train import killing, launched
from tests.train.launched import (
    Job,
    Outcome,
    furthest_apart,
    outcomes,
    outcomes_of_launcher,
    repeatable,
    tensors,
    tiny,
    tiny_overrides,
)

SIX = ("training.steps=6", "training.checkpoint_every=3")
WORLDS: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "one": (None, ()),
    "ddp": (2, ("training.parallel=ddp",)),
    "fsdp": (2, ("training.parallel=fsdp",)),
}
CELLS = list(itertools.product(WORLDS, ("float32", "bfloat16"), (1, 2)))
FEW = [("one", "bfloat16", 2), ("ddp", "float32", 2), ("fsdp", "bfloat16", 1)]
"""One a parallelism; each of the other values occurs."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are started: how many threads add numbers up shows in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def no_errors(done: list[list[Outcome]]) -> None:
    assert [rank.message for ranks in done for rank in ranks if rank.error] == []


def assert_same_run(patched: Path, whole: Path, step: int, *, but_for: Set[str] = frozenset()) -> None:
    """Tensors bit for bit, positions (but for these entries), and all log lines."""
    assert furthest_apart(tensors(patched, step), tensors(whole, step)) == 0
    newest = [checkpoint.latest_in(run / "checkpoints") for run in (patched, whole)]
    states = [{k: v for k, v in c.state().items() if k not in but_for} for c in newest if c is not None]
    assert [state["step"] for state in states] == [step, step]
    assert states[0] == states[1]
    lines = [read_metrics(run / "metrics.jsonl") for run in (patched, whole)]
    assert [line["step"] for line in lines[0]] == list(range(1, step + 1))
    assert repeatable(lines[0]) == repeatable(lines[1])


def check_cells(cells: Sequence[tuple[str, str, int]], folder: Path, shards: Path) -> None:
    """6 steps = 3 + SIGKILL of a rank in step 5 + what is left."""
    for processes in {WORLDS[world][0] for world, _, _ in cells}:
        rest = []
        for world, precision, parts in cells:
            if WORLDS[world][0] != processes:
                continue
            name = f"{world} {precision} {parts}"
            overrides = [f"training.precision={precision}", f"training.accumulation={parts}", *WORLDS[world][1]]
            config, patched = tiny(shards, *SIX, *overrides), folder / f"{name} patched"
            launched.write_jobs([Job.of(config, patched, fault="kill")], folder / name)
            killed = run_forked(launched.main, folder / name, processes=processes)
            assert killed.returncode == (1 if processes else -signal.SIGKILL), killed.stderr[-2000:]
            assert [c.step for c in checkpoint.all_in(patched / "checkpoints")] == [3]
            rest += [Job.of(config, patched, start_from=patched), Job.of(config, folder / f"{name} whole")]
        no_errors(outcomes(rest, folder / f"rest {processes}", processes=processes))
        for patched_job, whole_job in zip(rest[::2], rest[1::2], strict=True):
            assert_same_run(Path(patched_job.run_dir), Path(whole_job.run_dir), 6)
            moved = furthest_apart(tensors(patched_job.run_dir, 6), tensors(patched_job.run_dir, 3))
            assert moved > 1e-3, "the steps after the kill did something"


def test_resume_is_bit_exact(tmp_path: Path, shards: Path) -> None:
    check_cells(FEW, tmp_path, shards)


@pytest.mark.slow
def test_resume_is_bit_exact_in_every_combination(tmp_path: Path, shards: Path) -> None:
    check_cells([cell for cell in CELLS if cell not in FEW], tmp_path, shards)


def test_another_seed_is_another_run(tmp_path: Path, shards: Path) -> None:
    """The control of all tests here: equality is not for free."""
    for seed in (0, 1):
        train(tiny(shards, *SIX, f"seed={seed}"), tmp_path / f"{seed}")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "0", tmp_path / "1", 6)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path: Path, shards: Path, kills: int) -> None:
    """A checkpoint after every step, so many kills hit its writing: the loss curve is that of an undisturbed run."""
    config = tiny(shards, f"training.steps={8 * kills}", "training.checkpoint_every=1")
    whole, patched = tmp_path / "whole", tmp_path / "patched"
    patched.mkdir()
    config.save(patched)
    done = run_forked(killing.main, patched, kills)
    assert done.returncode == 0, done.stderr[-4000:]
    report = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(report) == kills, "each kill hit a run that was still going on"
    assert len(set(report)) > kills / 3, "and not always at the same step"
    train(config, whole)
    assert_same_run(patched, whole, 8 * kills)


def test_worker_killed_under_torchrun_is_replaced(tmp_path: Path, shards: Path) -> None:
    """The launcher starts all again, the recipe finds its checkpoint, and the run ends as without the kill."""
    config = tiny(shards, *SIX, "training.parallel=fsdp")
    killed = Job.of(config, tmp_path / "patched", fault="kill_once", by_recipe=True)
    whole = Job.of(config, tmp_path / "whole", by_recipe=True)
    done = outcomes_of_launcher(killed, tmp_path / "launch 1", processes=2, restarts=2)
    no_errors([done, *outcomes([whole], tmp_path / "launch 2", processes=2)])
    assert [rank.restarts for rank in done] == [1, 1]
    assert [rank.optimizer_steps for rank in done] == [3, 3], "it went on from the checkpoint"
    assert_same_run(tmp_path / "patched", tmp_path / "whole", 6)


@pytest.mark.slow
def test_worker_of_one_of_two_launchers_is_replaced(tmp_path: Path, shards: Path) -> None:
    """One launcher counts a restart, the other does not: their processes go on from one checkpoint all the same."""
    config = tiny(shards, *SIX, "training.parallel=fsdp")
    patched = Job.of(config, tmp_path / "patched", fault="kill_once", by_recipe=True)
    whole = Job.of(config, tmp_path / "whole", by_recipe=True)
    done = launched.outcomes_of_two_launchers(patched, tmp_path / "two", restarts=2)
    no_errors([done, *outcomes([whole], tmp_path / "one", processes=2)])
    assert sorted(rank.restarts for rank in done) == [0, 1]
    assert [rank.optimizer_steps for rank in done] == [3, 3], "they went on from the checkpoint"
    assert_same_run(tmp_path / "patched", tmp_path / "whole", 6)


def test_run_that_is_told_to_stop(tmp_path: Path, shards: Path) -> None:
    """SIGTERM: status 75, a checkpoint of the step it was in, and a resume to the numbers of an undisturbed run."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    overrides = tiny_overrides(shards, "training.steps=10000")
    with forked(cli.main, ["train", "digits_paper", "--run-dir", str(stopped), *overrides]) as (process,):
        until = time.monotonic() + PATIENCE
        while len(read_metrics(stopped / "metrics.jsonl")) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        process.terminate()
        process.join(PATIENCE)
    assert process.exitcode == STOPPED_EXIT_CODE
    saved = checkpoint.latest_in(stopped / "checkpoints")
    assert saved is not None
    assert saved.step == len(read_metrics(stopped / "metrics.jsonl")) < 10000
    longer = tiny(shards, f"training.steps={saved.step + 2}")
    train(longer, stopped, resume=True)
    train(longer, whole)
    # Progress goes on from where it was when the number of steps changes: the flow's rows do not depend on it.
    assert_same_run(stopped, whole, saved.step + 2, but_for={"anchor"})


def test_one_rank_is_told_to_stop(tmp_path: Path, shards: Path) -> None:
    """A scheduler may signal one process only: all stop after the same step."""
    config = tiny(shards, *SIX, "training.parallel=fsdp")
    jobs = [
        Job.of(config, tmp_path / "run", fault="terminate"),
        Job.of(config, tmp_path / "run", start_from=tmp_path / "run"),
        Job.of(config, tmp_path / "whole"),
    ]
    stopped, *rest = outcomes(jobs, tmp_path / "launch", processes=2)
    assert [rank.error for rank in stopped] == ["StoppedBySignal"] * 2
    assert [rank.optimizer_steps for rank in stopped] == [2, 2]
    assert "step_00000002" in stopped[0].message
    no_errors(rest)
    assert rest[0][0].optimizer_steps == 4
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)
