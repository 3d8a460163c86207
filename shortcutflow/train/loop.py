"""The training loop: one flat function, its parts passed in from their own files."""

from __future__ import annotations

import itertools
import math
import os
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shortcutflow.config import CONFIG_FILE, RunConfig
from shortcutflow.data.source import DataInfo
from shortcutflow.distributed import NEVER, Rank, World, joined
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.io.atomic import require_absent
from shortcutflow.run_dir import CHECKPOINTS, write_weights
from shortcutflow.train import checkpoint
from shortcutflow.train.checkpoint import Checkpoint
from shortcutflow.train.faults import BadSteps, NonFiniteError
from shortcutflow.train.heartbeat import SLOW_FACTOR, Heartbeat, clear_beats
from shortcutflow.train.metrics import METRICS_FILE, MetricsLog
from shortcutflow.train.numerics import switches
from shortcutflow.train.optim import clip_gradients, set_lr
from shortcutflow.train.parts import (
    Parts,
    build_parts,
    norms_of,
    save,
    save_snapshots,
    saver_for,
)
from shortcutflow.train.position import Position
from shortcutflow.train.reporter import Reporter
from shortcutflow.train.signals import StoppedBySignal, StopRequest
from shortcutflow.train.step import agree, backward_pass, update
from shortcutflow.train.visualize import grid_file, shows_grid, visualize

RANKS = "ranks"
"""The folder of a run where each process leaves its signs of life."""

__all__ = ["NonFiniteError", "train"]


def train(config: RunConfig, run_dir: Path, *, resume: bool = False) -> None:
    """Train a network and leave config, metrics, sample grids and checkpoints in the run's folder.

    Every random number is a function of (seed, step, purpose) and the data's position of the samples seen, so a run
    that was stopped and resumed has the same weights, bit for bit, as one that was not. Under torchrun every process
    calls this; global batches and random numbers are those of one process.

    Args:
        config: the run.
        run_dir: its folder; made if missing.
        resume: continue from the folder's newest checkpoint, if it has one. Processes that torchrun has started again
            do so in any case. Until everything is loaded and fits, nothing in the folder changes.

    Raises:
        NonFiniteError: naming the step, what is not finite and the last good checkpoint; nothing of the bad step
            reaches the weights.
        StoppedBySignal: after SIGTERM, SIGUSR1 or Ctrl-C, when the state is saved.
        SavingError: if a checkpoint could not be written, naming the last good one.
        ValueError: for parts that do not fit together, or a folder that holds a run which is not to be continued.
    """
    settings = config.training
    rank = Rank.from_environment()
    with ExitStack() as stack:
        stack.enter_context(switches(tf32=settings.tf32, deterministic=settings.deterministic))
        # Left last: what ends a run can hang too.
        heartbeat = Heartbeat(run_dir / RANKS, rank.number, rank.world_size, settings.hang_timeout)
        stack.push(heartbeat)
        # The heartbeat, which names the rank at fault, speaks before a collective gives up.
        timeout = timedelta(seconds=2 * SLOW_FACTOR * settings.hang_timeout) or NEVER
        grouped = settings.parallel == "fsdp"
        world = stack.enter_context(joined(settings.device, always_grouped=grouped, timeout=timeout))
        last = agreed_start(run_dir, world, resume=resume)
        # A run that cannot be built leaves no folder behind, and one that cannot go on leaves its own as it was.
        parts = build_parts(config, world, last)
        if last is not None and (kept := DataInfo.load(run_dir)) is not None:
            parts.info.require_same_latents(kept)
        position = Position.of(last.step, last.state(), settings.steps) if last is not None else Position()
        if world.is_first:
            run_dir.mkdir(parents=True, exist_ok=True)
            if last is None:
                _keep_metrics(run_dir)
            print(f"run folder: {run_dir}", flush=True)
            config.save(run_dir)
            parts.info.save(run_dir)
            clear_beats(run_dir / RANKS)
        world.wait_for_all()
        heartbeat.start()
        stack.push(heartbeat.failed)
        _run_steps(config, run_dir, parts, world, heartbeat, stack, position)
        if world.is_first:
            write_weights(run_dir)


def agreed_start(run_dir: Path, world: World, *, resume: bool) -> Checkpoint | None:
    """The checkpoint that every process goes on from; None begins anew. What the first process sees counts.

    A torchrun agent counts the restarts of its own workers only, and starts them again without counting when a worker
    of another machine has died: one process that knows of a restart is enough.

    Raises:
        ValueError: in every process, if the folder holds a run that is not to be continued.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = any(world.gather(resume or restarted))
    last = checkpoint.latest_in(run_dir / CHECKPOINTS)
    refused = None if resume else _occupied(run_dir)
    refused, step = world.gather((refused, last.step if last is not None else None))[0]
    if refused is not None:
        raise ValueError(refused)
    return Checkpoint(checkpoint.folder_of(run_dir / CHECKPOINTS, step), step) if step is not None else None


def _occupied(run_dir: Path) -> str | None:
    """Why no new run can have this folder."""
    if (run_dir / CONFIG_FILE).exists():
        return f"{run_dir} holds a run already: --resume continues it, another --run-dir starts anew"
    try:
        require_absent(run_dir)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _keep_metrics(run_dir: Path) -> None:
    """A run that begins anew in its folder, as it has no checkpoint yet, keeps its earlier numbers."""
    metrics = run_dir / METRICS_FILE
    if not (run_dir / CONFIG_FILE).exists():
        return
    said = f"{run_dir} has no checkpoint, so training begins at step 0"
    if metrics.exists():
        number = next(n for n in itertools.count(1) if not metrics.with_suffix(f".{n}.jsonl").exists())
        kept = metrics.rename(metrics.with_suffix(f".{number}.jsonl"))
        said += f"; the numbers so far are kept in {kept.name}"
    print(said, file=sys.stderr, flush=True)


def _run_steps(
    config: RunConfig, run_dir: Path, parts: Parts, world: World, heartbeat: Heartbeat, stack: ExitStack,
    position: Position,
) -> None:  # fmt: skip
    """Optimizer steps from where the run is; what is opened for them is closed with the stack."""
    settings, checkpoints, start = config.training, run_dir / CHECKPOINTS, position.step
    log = stack.enter_context(MetricsLog(run_dir, resume_at=start)) if world.is_first else None
    saver = stack.enter_context(saver_for(config, checkpoints, world))
    bad_steps = BadSteps(
        stop=settings.on_non_finite == "stop", skipped=position.skipped_steps, world=world, saver=saver
    )
    stop = stack.enter_context(StopRequest())
    bar = stack.enter_context(_progress_bar(start, settings.steps, shown=world.is_first))
    decoder = ImageDecoder(parts.info, world.device) if world.is_first else None
    reporter = Reporter(config, parts, world, position)

    for step in range(start, settings.steps):
        done, is_last = step + 1, step + 1 == settings.steps
        logs_now = is_last or done % settings.log_every == 0
        heartbeat.beat(step, "data")
        reporter.start_step()
        batch = next(parts.stream)
        reporter.got_data()

        set_lr(parts.optimizer, config.optimizer.lr_at(step, settings.steps))
        reports = backward_pass(config, parts, world, batch, position, step, heartbeat)
        grad_norm = clip_gradients(parts.optimizer, config.optimizer.max_grad_norm)

        heartbeat.beat(step, "step")
        is_bad, stopping = agree(world, reports, grad_norm, stop.requested is not None)
        if is_bad:
            said = bad_steps.skip_or_stop(step, batch, reports, grad_norm)
            if world.is_first:
                bar.write(said, file=sys.stderr)
        else:
            bad_steps.step_was_good()
            reporter.add(reports, grad_norm, update(parts, step, norms_of(config, parts, world) if logs_now else None))
        parts.optimizer.zero_grad(set_to_none=True)
        reporter.end_step()
        bar.update()

        if logs_now:
            heartbeat.beat(step, "log")
            numbers = reporter.take(done, bad_steps.skipped)
            if log is not None:
                log.numbers(done, numbers)
                bar.set_postfix_str(f"loss {numbers.get('loss', math.nan):.3f}", refresh=False)
        save_snapshots(config, parts, run_dir, done, first=world.is_first)
        if is_last or stopping or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            heartbeat.beat(step, "save")
            save(config, parts, saver, position, done, bad_steps.skipped)
        if shows_grid(config, parts.info, done):
            heartbeat.beat(step, "evaluate")
            images = visualize(
                config,
                parts.info,
                parts.weights(config.sample_weights),
                world.device,
                decoder,
                grid_file(run_dir, done),
            )
            if log is not None:
                for name, pixels in images.items():
                    log.picture(done, name, pixels)
        if stopping and not is_last:
            saver.wait()
            signals = filter(None, world.gather(stop.requested))
            raise StoppedBySignal(next(signals), checkpoint.folder_of(checkpoints, done), done)
    saver.wait()


def _progress_bar(start: int, steps: int, *, shown: bool) -> tqdm[Any]:
    # In a log file a line every half minute will do.
    return tqdm(
        total=steps, initial=start, desc="training", unit="step", mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not shown,
    )  # fmt: skip
