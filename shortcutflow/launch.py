"""From a recipe's config to a finished run: overrides, folder, training, evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shortcutflow.config import CONFIG_FILE, RunConfig, with_overrides
from shortcutflow.evaluation.runs import PICTURE_FILE, find_run, load_run


@dataclass(frozen=True)
class Options:
    """What a person may ask of a recipe besides ``section.field=value``.

    Attributes:
        run_dir: the run's folder; None makes a new one below ``runs/NAME``.
        resume: continue the run in run_dir, or the newest one of this name.
        smoke: a few steps and samples, to see that everything works.
        dry_run: say what would be done.
        objective: short for ``objective.kind=...``.
    """

    run_dir: Path | None = None
    resume: bool = False
    smoke: bool = False
    dry_run: bool = False
    objective: str | None = None


def run_recipe(config: RunConfig, overrides: Sequence[str] = (), options: Options = Options()) -> Path | None:
    """Train and evaluate; prints where things are. Gives the run's folder, or None for a dry run.

    Raises:
        ValueError: for overrides that do not fit, or a folder that holds a run already.
        FileNotFoundError: if there is no run to resume.
    """
    overrides = [f"objective.kind={options.objective}"] * (options.objective is not None) + list(overrides)
    if options.resume:
        folder = find_run(options.run_dir or _runs_of(config))
        # The saved config is the run; only what is said now may change it, for example training.steps.
        config = with_overrides(RunConfig.load(folder), overrides)
    else:
        config = with_overrides(smoke(config) if options.smoke else config, overrides)
        folder = options.run_dir or _runs_of(config) / time.strftime("%Y%m%d-%H%M%S")
        if (folder / CONFIG_FILE).exists():
            raise ValueError(f"{folder} holds a run already: --resume continues it, another --run-dir starts anew")
    if options.dry_run:
        print(config.model_dump_json(indent=2))
        print(f"would train {config.training.steps} steps into {folder}")
        return None
    _train_and_evaluate(config, folder, resume=options.resume)
    return folder


def _runs_of(config: RunConfig) -> Path:
    return Path("runs") / config.name


def _train_and_evaluate(config: RunConfig, folder: Path, *, resume: bool) -> None:
    # Imported here: they take seconds to load, which --help and --dry-run should not.
    from shortcutflow.train.loop import train

    print(f"run folder: {folder}", flush=True)
    start = time.perf_counter()
    try:
        train(config, folder, resume=resume)
    except KeyboardInterrupt:
        print(f"\nstopped; --resume --run-dir {folder} continues from the last checkpoint")
        raise
    print(f"trained in {time.perf_counter() - start:.0f} s")
    if config.evaluation is not None:
        print(f"\n{config.objective.kind}, weights: {config.sample_weights}\n{_evaluate(config, folder)}\n", flush=True)
        if (folder / PICTURE_FILE).exists():
            print(f"picture: {folder / PICTURE_FILE}")


def _evaluate(config: RunConfig, folder: Path) -> str:
    """Measure as the config says; gives the table."""
    if config.evaluation is not None and config.evaluation.kind == "policy":
        from shortcutflow.evaluation import policy

        return policy.table(policy.evaluate_policy(load_run(folder)))
    from shortcutflow.evaluation import pixels

    return pixels.table(pixels.evaluate_pixels(load_run(folder)))


def smoke(config: RunConfig) -> RunConfig:
    """The same run with 4 steps of at most 8 samples and hardly any evaluation."""
    training = config.training.model_copy(
        update={"steps": 4, "global_batch_size": min(8, config.training.global_batch_size), "log_every": 1}
    )
    evaluation = config.evaluation.smoke() if config.evaluation is not None else None
    return config.model_copy(update={"training": training, "evaluation": evaluation})
