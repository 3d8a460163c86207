"""Runs in processes of their own, for tests: under torchrun, killed, or with a fault put in on purpose.

A test lists jobs and gets back what each rank did with each. The jobs of one launch run one after the other in the
same processes, as starting those takes longest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recipes.digits import paper_recipe as recipe
from shortcutflow import checkpoint
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.stream import ShardStream
from shortcutflow.launch import Options, run_recipe
from shortcutflow.train.loop import train
from shortcutflow.types import Batch
from tests.processes import PATIENCE, run, run_forked

TINY = (
    "training.steps=5", "training.global_batch_size=12", "training.log_every=1", "training.checkpoint_every=0",
    "training.grid_steps=[1]", "backbone.options.width=16", "backbone.options.depth=1", "backbone.options.heads=2",
    "evaluation=null",
    # The weights move at once, and far, also without a warm-up.
    "optimizer.lr=0.01", "optimizer.warm_up_steps=0", "optimizer.schedule=constant",
    # Adam divides a gradient by its size: where it is zero but for rounding, as attention's key biases have it, a small
    # eps would make a whole step of the last bit.
    "optimizer.eps=1e-4",
    # Half of the target network is new after each step: a stale one cannot hide.
    'emas={"ema": {"decay": 0.5, "warm_up": false}, "slow": {"kind": "power", "sigma_rel": 0.1}}',
)  # fmt: skip
TIMES = ("images_per_second", "data_waiting_share", "slowest_step_seconds", "slowest_step_rank", "memory_bytes")
"""What a log line says of the clock or the machine; all else must repeat."""


def tiny_overrides(shards: Path, *overrides: str) -> list[str]:
    """What makes of the digits' recipe a run whose steps take milliseconds."""
    bootstrap = [] if "objective.kind=flow_matching" in overrides else ["objective.bootstrap_fraction=0.5"]
    return [*TINY, *bootstrap, f"data.folder={shards}", *overrides]


def tiny(shards: Path, *overrides: str) -> RunConfig:
    """Such a run."""
    return with_overrides(recipe(), tiny_overrides(shards, *overrides))


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        config, run_dir: of the run.
        start_from: continue a copy of this run.
        fault: a name in FAULTS.
        by_recipe: start it as a recipe does, which resumes by itself after a restart.
    """

    config: dict[str, Any]
    run_dir: str
    start_from: str | None = None
    fault: str | None = None
    by_recipe: bool = False

    @classmethod
    def of(cls, config: RunConfig, run_dir: Path, *, start_from: Path | None = None, **more: Any) -> Job:
        """From a config and paths."""
        return cls(config.model_dump(mode="json"), str(run_dir), str(start_from) if start_from else None, **more)


@dataclass
class Outcome:
    """What a rank did with a job.

    Attributes:
        error, message: of the exception that ended it.
        keys: of each batch it was handed.
        optimizer_steps: how many changed its weights.
        restarts: how often the launcher had started the processes again.
    """

    error: str | None = None
    message: str = ""
    keys: list[list[str]] = field(default_factory=list)
    optimizer_steps: int = 0
    restarts: int = 0


def write_jobs(jobs: Sequence[Job], folder: Path) -> None:
    """Leave the jobs in the folder for the processes that will do them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))


def torchrun(jobs: Sequence[Job], folder: Path, *options: str) -> list[str]:
    """The command by which a launcher has its processes do the jobs."""
    write_jobs(jobs, folder)
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "tests.train.launched", str(folder)]


def outcomes_of_two_launchers(job: Job, folder: Path, restarts: int) -> list[Outcome]:
    """Do a job in two processes, each started by a launcher of its own as on a machine of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = torchrun(
        [job], folder, "--nproc-per-node=1", f"--max-restarts={restarts}", "--nnodes=2", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={folder.name}",
    )  # fmt: skip
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(run, [both, both]))
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stderr[-3000:] for one in done)
    return read_outcomes(folder, 2)[0]


def outcomes_of_launcher(job: Job, folder: Path, *, processes: int, restarts: int) -> list[Outcome]:
    """Do a job under ``torchrun``, which starts its processes again where one fails."""
    options = "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"
    done = run(torchrun([job], folder, *options))
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}"
    return read_outcomes(folder, processes)[0]


def outcomes(
    jobs: Sequence[Job], folder: Path, *, processes: int | None = None, patience: float = PATIENCE
) -> list[list[Outcome]]:
    """Do the jobs; gives for each what each rank did. Their faults are no failure of the processes."""
    write_jobs(jobs, folder)
    done = run_forked(main, folder, processes=processes, patience=patience)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}"
    return read_outcomes(folder, processes or 1)


def read_outcomes(folder: Path, processes: int) -> list[list[Outcome]]:
    """What each rank did with each job of the folder."""
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(processes)]
    return [[Outcome(**rank) for rank in job] for job in zip(*ranks, strict=True)]


def global_batches(ranks: Sequence[Outcome]) -> list[list[str]]:
    """The keys of each global batch in its order, put together from those of the ranks."""
    steps = zip(*(rank.keys for rank in ranks), strict=True)
    return [[key for keys in zip(*shares, strict=True) for key in keys] for shares in steps]


def tensors(run_dir: Path | str, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint by group and name, read by one process."""
    saved = checkpoint.Checkpoint(Path(run_dir) / "checkpoints" / f"step_{step:08d}", step)
    config = RunConfig.load(Path(run_dir))
    groups = ["network", "optimizer", *(checkpoint.ema_group(name) for name in config.emas)]
    return {f"{group}/{name}": tensor for group in groups for name, tensor in saved.tensors(group).items()}


def furthest_apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any number in two sets of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def repeatable(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log lines without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("tflops")} for line in lines]


# ---- in the processes that are started


@dataclass(frozen=True)
class Moment:
    """When a rank was handed a batch: its number counted from 1 on in this process, and who and where it is."""

    number: int
    rank: int
    last_rank: bool
    run_dir: Path


def nan_in_one(at: Moment, batch: Batch) -> None:
    """A number of the fifth batch of the last rank is NaN."""
    if at.last_rank and at.number == 5:
        batch.data[1, 0, 3, 3] = float("nan")


def nan_from_third(at: Moment, batch: Batch) -> None:
    """From the third batch on no data of the last rank is finite."""
    if at.last_rank and at.number >= 3:
        batch.data.fill_(float("nan"))


def error_in_one(at: Moment, batch: Batch) -> None:
    """The last rank, and no other, meets a defect in step 2."""
    if at.last_rank and at.number == 2:
        raise ValueError("a defect")


def kill(at: Moment, batch: Batch) -> None:
    """The last rank is killed in step 5, once the checkpoint of step 3 is whole."""
    if at.last_rank and at.number == 5:
        kill_after_checkpoint(at.run_dir)


def kill_once(at: Moment, batch: Batch) -> None:
    """The same, unless the launcher has started it again."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill(at, batch)


def kill_after_checkpoint(run_dir: Path) -> None:
    """SIGKILL to this process."""
    until = time.monotonic() + 60
    while checkpoint.latest_in(run_dir / "checkpoints") is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(at: Moment, batch: Batch) -> None:
    """The last rank, and no other, is told to stop in step 2."""
    if at.last_rank and at.number == 2:
        os.kill(os.getpid(), signal.SIGTERM)


FAULTS: dict[str, Callable[[Moment, Batch], None]] = {
    fault.__name__: fault for fault in (error_in_one, nan_in_one, nan_from_third, kill, kill_once, terminate)
}
STALE_AVERAGE = "stale_average"
"""The fault that sharded averages are prone to: their outermost weights stay gathered, so targets never change."""


@contextmanager
def stale_averages() -> Iterator[None]:
    """Put this fault in."""
    from torch.distributed import fsdp

    right = fsdp.fully_shard

    def wrong(module: Any, *, reshard_after_forward: Any = None, **options: Any) -> Any:
        return right(module, **options)

    with mock.patch.object(fsdp, "fully_shard", wrong), mock.patch("shortcutflow.ema._reshard"):
        yield


@contextmanager
def watched(job: Job, outcome: Outcome) -> Iterator[None]:
    """Note the batches and optimizer steps of this process, and put the job's fault in."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    fault, read, step = FAULTS.get(job.fault or ""), ShardStream.__next__, torch.optim.AdamW.step

    def next_batch(stream: ShardStream) -> Batch:
        batch = read(stream)
        outcome.keys.append(list(batch.keys))
        if fault is not None:
            # The cache of the stream must stay as it is.
            batch = Batch(batch.data.clone(), batch.y, batch.keys)
            fault(Moment(len(outcome.keys), rank, rank == size - 1, Path(job.run_dir)), batch)
        return batch

    def counted(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        outcome.optimizer_steps += not optimizer.found_inf  # type: ignore[attr-defined]
        return step(optimizer, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ShardStream, "__next__", next_batch))
        stack.enter_context(mock.patch.object(torch.optim.AdamW, "step", counted))
        if job.fault == STALE_AVERAGE:
            stack.enter_context(stale_averages())
        yield


def do(job: Job) -> Outcome:
    """One job in this process."""
    outcome = Outcome(restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    config, run_dir = RunConfig.model_validate(job.config), Path(job.run_dir)
    if job.start_from is not None and os.environ.get("RANK", "0") == "0":
        # The other ranks wait for this one when they form their group.
        copy_run(Path(job.start_from), run_dir)
    with watched(job, outcome):
        try:
            if job.by_recipe:
                run_recipe(config, [], Options(run_dir=run_dir))
            else:
                train(config, run_dir, resume=job.start_from is not None)
        except (Exception, SystemExit) as error:
            outcome.error, outcome.message = type(error).__name__, str(error)
    return outcome


def copy_run(source: Path, target: Path) -> None:
    """A run to continue elsewhere; the run itself where both are the same."""
    if source != target:
        shutil.copytree(source, target)


def main(folder: Path) -> None:
    """Do the jobs of a folder and write what became of them."""
    torch.set_num_threads(1)
    jobs = [Job(**job) for job in json.loads((folder / "jobs.json").read_text())]
    done = [asdict(do(job)) for job in jobs]
    (folder / f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
