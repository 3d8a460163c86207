"""From a recipe's config to a finished run: overrides, folder, training, evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shortcutflow import checkpoint
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.distributed import Rank
from shortcutflow.run_dir import CHECKPOINTS, RUNS, find_run
from shortcutflow.smoke import smoke, with_stand_ins

if TYPE_CHECKING:
    from shortcutflow.train.loggers import Logger


@dataclass(frozen=True)
class Options:
    """Options of a recipe besides ``section.field=value``.

    Attributes:
        run_dir: the run's folder; None makes a new one below ``runs/NAME``.
        resume: continue the run in run_dir, or the newest one of this name.
        smoke: a few steps of a tiny network, on stand-in data if there is none, to see that everything works.
        dry_run: say what would be done.
        objective: short for ``objective.kind=...``.
    """

    run_dir: Path | None = None
    resume: bool = False
    smoke: bool = False
    dry_run: bool = False
    objective: str | None = None


def run_recipe(
    config: RunConfig, overrides: Sequence[str] = (), options: Options = Options(), loggers: Sequence[Logger] = ()
) -> Path | None:
    """Train and evaluate; prints where things are. Returns the run's folder, or None for a dry run.

    Raises:
        ValueError: for overrides that do not fit, or a folder that holds a run already.
        FileNotFoundError: if there is no run to resume.
    """
    overrides = [f"objective.kind={options.objective}"] * (options.objective is not None) + list(overrides)
    if options.resume:
        folder = find_run(options.run_dir or _runs_of(config))
        # The saved config is the run; only these overrides change it, for example training.steps.
        config = with_overrides(RunConfig.load(folder), overrides)
    else:
        config = with_overrides(smoke(config) if options.smoke else config, overrides)
        folder = options.run_dir or _new_folder(config)
    if options.dry_run:
        if Rank.from_environment().is_main:
            print(config.model_dump_json(indent=2))
            print(f"would train {config.training.steps} steps into {folder}")
        return None
    if options.smoke:
        config = with_stand_ins(config)
    _train_and_evaluate(config, folder, resume=options.resume, loggers=loggers)
    return folder


def _runs_of(config: RunConfig) -> Path:
    return Path(RUNS) / config.name


def _new_folder(config: RunConfig) -> Path:
    """A folder that no run has, the same in every process of a job and after its restarts."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job == "none" and Rank.from_environment().world_size == 1:
        return _runs_of(config) / time.strftime("%Y%m%d-%H%M%S")
    if job == "none":
        raise ValueError("several processes without a common job id need --run-dir, a folder that they all see")
    return _runs_of(config) / f"job-{job}"


def _train_and_evaluate(config: RunConfig, folder: Path, *, resume: bool, loggers: Sequence[Logger]) -> None:
    # Imported here: they take seconds to load, which --help and --dry-run should not.
    from shortcutflow.train.loop import train
    from shortcutflow.train.signals import StoppedBySignal

    if config.evaluation is not None:
        config.evaluation.check(config)
    start = time.perf_counter()
    try:
        train(config, folder, resume=resume, loggers=loggers)
    except StoppedBySignal as stopped:
        if Rank.from_environment().is_main:
            print(f"\n{stopped.message}", flush=True)
        raise
    except KeyboardInterrupt:
        # Not in the steps, which save first: in the evaluation, or before the first step.
        last = checkpoint.latest_in(folder / CHECKPOINTS)
        goes_on = f"--resume --run-dir {folder} goes on from step {last.step}" if last else "nothing was saved yet"
        print(f"\nstopped; {goes_on}")
        raise
    if Rank.from_environment().is_main:
        print(f"trained in {time.perf_counter() - start:.0f} s")
    if table := _evaluate(config, folder):
        print(f"\n{config.objective.kind}, weights: {config.sample_weights}\n{table}\n", flush=True)


def _evaluate(config: RunConfig, folder: Path) -> str:
    """Measure as the config says and write the report; returns it as a table on rank 0, else nothing."""
    from shortcutflow.evaluation.report import finish_report, table_of
    from shortcutflow.models.model import load

    settings, rank = config.evaluation, Rank.from_environment()
    if settings is None or not (rank.is_main or settings.on_every_rank):
        return ""
    model = load(folder, device=rank.device(config.training.device))
    measured = settings.run(model, config)
    return table_of(finish_report(measured, model, config)) if measured is not None and rank.is_main else ""
