"""Commands around a training run: train, sample, average, show-config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import shortcutflow
from shortcutflow.commands.options import Device, GuidanceScale, Labels, Place, Weights
from shortcutflow.commands.recipes import DryRun, ObjectiveName, Overrides, Resume, RunDir, Smoke, load_recipe
from shortcutflow.config import RunConfig
from shortcutflow.io.atomic import atomic_file, require_place
from shortcutflow.launch import Options, run_recipe
from shortcutflow.schedule import DEFAULT_STEPS


def train_command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of its file.")],
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    objective: ObjectiveName = None,
) -> None:
    """Train a recipe and evaluate it."""
    run_recipe(load_recipe(recipe), overrides or [], Options(run_dir, resume, smoke, dry_run, objective))


def sample_command(
    model: Place,
    steps: Annotated[list[int] | None, typer.Option(help="Numbers of steps, a row each. [default: 1 2 4 128]")] = None,
    labels: Labels = None,
    count: Annotated[int | None, typer.Option(help="Samples a row, where no labels are given. [default: 10]")] = None,
    out: Annotated[Path, typer.Option(help="The image to write (PNG).")] = Path("samples.png"),
    seed: Annotated[int, typer.Option(help="Of the noise, the same in each row.")] = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Sample a run or a model with several numbers of steps into one image."""
    from shortcutflow.distributed import Rank
    from shortcutflow.evaluation.sample_grid import sample_grid, save_image
    from shortcutflow.models.model import load

    require_place(out, ".png")
    opened = load(model, weights=weights, device=Rank().device(device))
    grid = sample_grid(
        opened, steps=steps or DEFAULT_STEPS, labels=labels, count=count, seed=seed, guidance_scale=guidance_scale
    )
    save_image(grid, out)
    print(f"{out}: {opened}")


def average_command(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a folder of runs (the newest is taken).")],
    sigma_rel: Annotated[float, typer.Option(help="Width of the EMA, as a fraction of training.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    step: Annotated[int | None, typer.Option(help="Up to this step. [default: the last snapshot]")] = None,
) -> None:
    """Make an EMA of any width from the snapshots of a run's power-function EMAs; sample it with --weights."""
    from safetensors.torch import save_file

    from shortcutflow.posthoc import find_snapshots, posthoc_ema
    from shortcutflow.run_dir import find_run

    require_place(out, ".safetensors")
    folder = find_run(run)
    snapshots = find_snapshots(folder)
    if not snapshots:
        raise FileNotFoundError(
            f'{folder} holds no snapshots: train with emas.NAME=\'{{"sigma_rel":0.05,"snapshot_every":1000}}\''
        )
    step = snapshots[-1].step if step is None else step
    tensors = posthoc_ema(snapshots, sigma_rel=sigma_rel, step=step)
    made_by = {"shortcutflow": shortcutflow.__version__}
    with atomic_file(out) as unfinished:
        save_file(tensors, unfinished, metadata={"sigma_rel": str(sigma_rel), "step": str(step)} | made_by)
    print(f"{out}: width {sigma_rel:g} at step {step}, of {folder}")


def show_config_command(
    run_or_recipe: Annotated[str, typer.Argument(help="A run's folder, a recipe's name or its file.")],
    overrides: Overrides = None,
) -> None:
    """Print the complete config of a run or a recipe, as JSON."""
    from shortcutflow.config import with_overrides
    from shortcutflow.run_dir import find_run

    if Path(run_or_recipe).is_dir():
        config = RunConfig.load(find_run(Path(run_or_recipe)))
    else:
        config = load_recipe(run_or_recipe)
    print(with_overrides(config, overrides or []).model_dump_json(indent=2))
