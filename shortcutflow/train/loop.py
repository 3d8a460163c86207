"""The training loop: one flat function; what happens in a step is in ``step.py``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from shortcutflow.checkpoint import folder_of
from shortcutflow.config import RunConfig
from shortcutflow.data.source import DataInfo
from shortcutflow.distributed import NEVER, Rank, World, joined
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.run_dir import CHECKPOINTS, write_weights
from shortcutflow.train.checkpoint_writer import CheckpointWriter
from shortcutflow.train.heartbeat import SLOW_FACTOR, Heartbeat, clear_beats
from shortcutflow.train.loggers import Logger, builders, open_loggers
from shortcutflow.train.metrics import MetricLogger
from shortcutflow.train.nonfinite import NonFiniteError, NonFiniteGuard
from shortcutflow.train.parallel import sum_over_shards
from shortcutflow.train.resume import Position, agreed_start, keep_metrics
from shortcutflow.train.signals import StoppedBySignal, StopRequest
from shortcutflow.train.state import TrainState, build_train_state, save, save_snapshots
from shortcutflow.train.step import UpdateNorms, arithmetic, clip_gradients, forward_backward, set_lr, step_if_finite
from shortcutflow.train.visualize import grid_file, shows_grid, visualize

RANKS = "ranks"
"""The folder of a run with the heartbeats of its ranks."""

__all__ = ["NonFiniteError", "train"]


def train(config: RunConfig, run_dir: Path, *, resume: bool = False, loggers: Sequence[Logger] = ()) -> None:
    """Train a network and leave config, metrics, sample grids and checkpoints in the run's folder.

    Every random number is a function of (seed, step, purpose) and the data's position of the samples seen, so a run
    that was stopped and resumed has the same weights, bit for bit, as one that was not. Under torchrun every process
    calls this; global batches and random numbers are those of one process.

    Args:
        config: the run.
        run_dir: its folder; made if missing.
        resume: continue from the folder's newest checkpoint, if it has one. Processes that torchrun has started again
            do so in any case. Until everything is loaded and fits, nothing in the folder changes.
        loggers: receive numbers and images besides those that the config names; used on rank 0, and closed at the end.

    Raises:
        NonFiniteError: naming the step, what is not finite and the last good checkpoint; nothing of the bad step
            reaches the weights.
        StoppedBySignal: after SIGTERM, SIGUSR1 or Ctrl-C, when the state is saved.
        SavingError: if a checkpoint could not be written, naming the last good one.
        ValueError: for settings that do not fit together, or a folder that holds a run which is not to be continued.
    """
    settings = config.training
    rank = Rank.from_environment()
    with ExitStack() as stack:
        stack.enter_context(arithmetic(tf32=settings.tf32, deterministic=settings.deterministic))
        # Left last: what ends a run can hang too.
        heartbeat = Heartbeat(run_dir / RANKS, rank.number, rank.world_size, settings.hang_timeout)
        stack.push(heartbeat)
        # The heartbeat, which names the rank at fault, comes before the timeout of a collective.
        timeout = timedelta(seconds=2 * SLOW_FACTOR * settings.hang_timeout) or NEVER
        world = stack.enter_context(
            joined(settings.device, always_grouped=settings.parallel == "fsdp", timeout=timeout)
        )
        builders(settings.loggers)
        last = agreed_start(run_dir, world, resume=resume)
        # A run that cannot be built leaves no folder behind, and one that cannot go on leaves its own as it was.
        state = build_train_state(config, world, last)
        if last is not None and (kept := DataInfo.load(run_dir)) is not None:
            state.info.require_same_latents(kept)
        position = Position.of(last.step, last.state(), settings.steps) if last is not None else Position()
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            if last is None:
                keep_metrics(run_dir)
            print(f"run folder: {run_dir}", flush=True)
            config.save(run_dir)
            state.info.save(run_dir)
            clear_beats(run_dir / RANKS)
        world.wait_for_all()
        heartbeat.start()
        stack.push(heartbeat.failed)
        active = stack.enter_context(open_loggers(config, run_dir, position.step, loggers)) if world.is_main else []
        _run_steps(config, run_dir, state, world, heartbeat, stack, position, active)
        if world.is_main:
            write_weights(run_dir)


def _run_steps(
    config: RunConfig, run_dir: Path, state: TrainState, world: World, heartbeat: Heartbeat, stack: ExitStack,
    position: Position, loggers: Sequence[Logger],
) -> None:  # fmt: skip
    """Optimizer steps from the run's position on; what is opened for them is closed with the stack."""
    settings, checkpoints, start = config.training, run_dir / CHECKPOINTS, position.step
    writer = stack.enter_context(
        CheckpointWriter(
            checkpoints, group=world.cpu_group, keep=settings.keep_checkpoints,
            keep_every=settings.keep_checkpoint_every,
        )
    )  # fmt: skip
    guard = NonFiniteGuard(
        stop=settings.on_non_finite == "stop", skipped=position.skipped_steps, world=world, writer=writer
    )
    stop = stack.enter_context(StopRequest())
    # In a log file a line every half minute will do.
    bar = stack.enter_context(
        tqdm(
            total=settings.steps, initial=start, desc="training", unit="step", disable=not world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
    )  # fmt: skip
    metrics = MetricLogger(config, state.stream, world, position, state.forward_flops)
    decoder = ImageDecoder(state.info, world.device) if world.is_main else None
    total_over_shards = sum_over_shards(world, settings)

    for step in range(start, settings.steps):
        done, is_last = step + 1, step + 1 == settings.steps
        logs_now = is_last or done % settings.log_every == 0
        heartbeat.beat(step, "data")
        metrics.start_step()
        batch = next(state.stream)
        metrics.got_data()

        set_lr(state.optimizer, config.optimizer.lr_at(step, settings.steps))
        reports = forward_backward(config, state, world, batch, position, step, heartbeat)
        grad_norm = clip_gradients(state.optimizer, config.optimizer.max_grad_norm)
        heartbeat.beat(step, "step")
        norms = UpdateNorms(state.optimizer, total_over_shards) if logs_now else None
        is_bad, stopping = step_if_finite(state.optimizer, world, reports, grad_norm, stop.requested is not None)
        if is_bad:
            message = guard.on_nonfinite(step, batch, reports, grad_norm)
            if world.is_main:
                bar.write(message, file=sys.stderr)
        else:
            guard.on_finite()
            state.update_emas(step)
            metrics.add(reports, grad_norm, norms.take() if norms is not None else {})
        state.optimizer.zero_grad(set_to_none=True)
        metrics.end_step()
        bar.update()

        if logs_now:
            heartbeat.beat(step, "log")
            numbers = metrics.take(done, guard.skipped)
            bar.set_postfix_str(f"loss {numbers.get('loss', math.nan):.3f}", refresh=False)
            for logger in loggers:
                logger.numbers(done, numbers)
        save_snapshots(config, state, writer, run_dir, done, is_main=world.is_main)
        if is_last or stopping or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            heartbeat.beat(step, "save")
            save(config, state, writer, position, done, guard.skipped)
        if shows_grid(config, state.info, done):
            heartbeat.beat(step, "evaluate")
            network, grid = state.weights(config.sample_weights), grid_file(run_dir, done)
            for name, pixels in visualize(config, state.info, network, world.device, decoder, grid).items():
                for logger in loggers:
                    logger.images(done, name, pixels)
        if stopping and not is_last:
            writer.wait()
            signals = filter(None, world.gather(stop.requested))
            raise StoppedBySignal(next(signals), folder_of(checkpoints, done), done)
    writer.wait()
