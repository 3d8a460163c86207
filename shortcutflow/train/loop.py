"""The training loop: one flat function, its parts passed in from their own files."""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shortcutflow.config import RunConfig
from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.runs import CHECKPOINTS, write_weights
from shortcutflow.train.distributed import World, joined
from shortcutflow.train.faults import BadSteps, NonFiniteError
from shortcutflow.train.hang import clear_beats
from shortcutflow.train.metrics import MetricsLog
from shortcutflow.train.optim import clip_gradients, set_lr
from shortcutflow.train.parts import (
    Parts,
    build_parts,
    norms_of,
    restore,
    save,
    save_snapshots,
    saver_for,
)
from shortcutflow.train.pictures import save_pictures, shows_grid, training_pictures
from shortcutflow.train.reporter import Reporter
from shortcutflow.train.signals import StoppedBySignal, StopRequest
from shortcutflow.train.step import agree, backward_pass, update
from shortcutflow.train.watchdog import Watchdog

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
        resume: continue from the folder's newest checkpoint, if it has one.

    Raises:
        NonFiniteError: naming the step, what is not finite and the last good checkpoint; nothing of the bad step
            reaches the weights.
        StoppedBySignal: after SIGTERM or SIGUSR1, when the state is saved.
        SavingError: if a checkpoint could not be written, naming the last good one.
        ValueError: for parts that do not fit together.
    """
    settings = config.training
    with ExitStack() as stack:
        world = stack.enter_context(joined(settings.device, sharded=settings.parallel == "fsdp"))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        # A run that cannot be built leaves no folder behind.
        parts = build_parts(config, world)
        if world.is_first:
            run_dir.mkdir(parents=True, exist_ok=True)
            config.save(run_dir)
            clear_beats(run_dir / RANKS)
        world.wait_for_all()
        start, skipped = restore(parts, run_dir / CHECKPOINTS) if resume else (0, 0)
        _run_steps(config, run_dir, parts, world, stack, start, skipped)
        if world.is_first:
            write_weights(run_dir)


def _run_steps(
    config: RunConfig, run_dir: Path, parts: Parts, world: World, stack: ExitStack, start: int, skipped: int
) -> None:
    """Optimizer steps from ``start`` on; what is opened for them is closed with the stack."""
    settings, checkpoints = config.training, run_dir / CHECKPOINTS
    log = stack.enter_context(MetricsLog(run_dir, resume_at=start)) if world.is_first else None
    saver = stack.enter_context(saver_for(config, checkpoints, world))
    bad_steps = BadSteps(stop=settings.on_non_finite == "stop", skipped=skipped, world=world, saver=saver)
    stop = stack.enter_context(StopRequest())
    watchdog = stack.enter_context(Watchdog(run_dir / RANKS, world.rank, world.size, settings.hang_timeout))
    bar = stack.enter_context(_progress_bar(start, settings.steps, shown=world.is_first))
    reporter, decoder = Reporter(config, parts, world), ImageDecoder(config.data.describe(), world.device)

    for step in range(start, settings.steps):
        done, is_last = step + 1, step + 1 == settings.steps
        logs_now = is_last or done % settings.log_every == 0
        watchdog.beat(step, "data")
        reporter.start_step()
        batch = next(parts.stream)
        reporter.got_data()

        set_lr(parts.optimizer, config.optimizer.lr_at(step, settings.steps))
        reports = backward_pass(config, parts, world, batch, step, watchdog)
        grad_norm = clip_gradients(parts.optimizer, config.optimizer.max_grad_norm)

        watchdog.beat(step, "step")
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
            watchdog.beat(step, "log")
            numbers = reporter.take(done, bad_steps.skipped)
            if log is not None:
                log.numbers(done, numbers)
                bar.set_postfix_str(f"loss {numbers.get('loss', math.nan):.3f}", refresh=False)
        save_snapshots(config, parts, run_dir, done, first=world.is_first)
        if is_last or stopping or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            watchdog.beat(step, "save")
            save(config, parts, saver, done, bad_steps.skipped)
        if shows_grid(config, done):
            watchdog.beat(step, "evaluate")
            made = training_pictures(config, parts.weights(config.sample_weights), world.device)
            if log is not None:
                for name, pixels in save_pictures(config, made, run_dir, done, decoder).items():
                    log.picture(done, name, pixels)
        if stopping and not is_last:
            saver.wait()
            signals = filter(None, world.gather(stop.requested))
            raise StoppedBySignal(next(signals), run_dir / CHECKPOINTS / f"step_{done:08d}")
    saver.wait()


def _progress_bar(start: int, steps: int, *, shown: bool) -> tqdm[Any]:
    # In a log file a line every half minute will do.
    return tqdm(
        total=steps, initial=start, desc="training", unit="step", mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not shown,
    )  # fmt: skip
