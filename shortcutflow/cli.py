"""The ``shortcutflow`` command, and the command line of a recipe file."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from shortcutflow.config import RunConfig
from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.launch import Options, run_recipe

RECIPE_GROUP = "shortcutflow.recipes"
LISTS = ("--steps", "--labels")
"""Options that take several values: ``--steps 1 4 128`` is ``--steps 1 --steps 4 --steps 128``."""

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Change the recipe.")]
RunDir = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME/DATE-TIME]")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir, or the newest of this recipe.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few steps and samples only, to see that everything works.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
ObjectiveName = Annotated[str | None, typer.Option("--objective", help="Short for objective.kind=NAME.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Shortcut models: train one network, sample it in any number of steps."""


@app.command("train")
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


@app.command("sample")
def sample_command(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a folder of runs (the newest is taken).")],
    steps: Annotated[list[int] | None, typer.Option(help="Sampling budgets, a row each. [default: 1 4 128]")] = None,
    labels: Annotated[list[int] | None, typer.Option(help="A label a sample. [default: all in turn]")] = None,
    count: Annotated[int | None, typer.Option(help="Samples a row, where no labels are given. [default: 10]")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write (PNG).")] = Path("samples.png"),
    seed: Annotated[int, typer.Option(help="Of the noise; every budget starts from the same.")] = 0,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    weights: Annotated[
        str | None, typer.Option(help="An average's name, 'current', or a .safetensors file. [default: the run's]")
    ] = None,
) -> None:
    """Sample a run at several budgets into one picture."""
    from shortcutflow.evaluation.grids import save_picture
    from shortcutflow.evaluation.runs import load_run
    from shortcutflow.evaluation.sheet import sample_sheet

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    loaded = load_run(run, weights=weights)
    picture = sample_sheet(
        loaded, budgets=steps or [1, 4, 128], labels=labels, count=count, seed=seed, guidance_scale=guidance_scale
    )
    save_picture(picture, str(out))
    print(f"{out}: {loaded.folder} at step {loaded.step}, weights {loaded.weights}")


@app.command("prepare")
def prepare_command(
    source: Annotated[Path, typer.Argument(help="Pictures: a folder, zip, tar, parquet files or shards.")],
    folder: Annotated[Path, typer.Argument(help="For the shards; the same command continues after a stop.")],
    size: Annotated[int, typer.Option(help="Side of the square pictures, in pixels.")],
    crop: Annotated[str, typer.Option(help="released, adm, stretch or none.")] = "released",
    format: Annotated[
        str | None, typer.Option(help="png, jpg or webp. [default: png up to 64 pixels, jpg above]")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of jpg and webp, 1 to 100.")] = 95,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Drop the classes.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="Pictures a shard.")] = 4096,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: all cores]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first picture that cannot be used.")] = False,
    latents: Annotated[bool, typer.Option("--latents", help="Encode them; under torchrun on several GPUs.")] = False,
    vae: Annotated[str | None, typer.Option(help=f"With --latents: hub id or folder. [default: {DEFAULT_VAE}]")] = None,
    device: Annotated[str | None, typer.Option(help="With --latents. [default: a GPU if there is one]")] = None,
    mirror: Annotated[bool, typer.Option(help="With --latents: keep those of mirror images too.")] = True,
) -> None:
    """Write raw pictures, or with --latents their latents, as shards that training streams from."""
    from shortcutflow.data.latents import prepare_latents
    from shortcutflow.data.prepare import prepare, summary

    if latents and (format is not None or quality != 95):
        raise ValueError("--latents stores numbers: --format and --quality are for pictures")
    if not latents and (vae is not None or device is not None or not mirror):
        raise ValueError("--vae, --device and --no-mirror go with --latents")
    # Crop and format are words here; what they may be is checked where they are used.
    shared: dict[str, Any] = {
        "size": size, "crop": crop, "labels": not no_labels, "seed": seed, "samples_per_shard": samples_per_shard,
        "workers": workers, "strict": strict,
    }  # fmt: skip
    try:
        if latents:
            manifest = prepare_latents(source, folder, vae=vae or DEFAULT_VAE, device=device, mirror=mirror, **shared)
        else:
            pictures: dict[str, Any] = {"format": format, "quality": quality}
            manifest = prepare(source, folder, **pictures, **shared)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues in {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":
        print(summary(manifest, folder))


@app.command("average")
def average_command(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a folder of runs (the newest is taken).")],
    sigma_rel: Annotated[float, typer.Option(help="Width of the average, as a share of training.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    step: Annotated[int | None, typer.Option(help="Up to this step. [default: the last snapshot]")] = None,
) -> None:
    """Make an average of any width from the snapshots of a run's power-function averages; sample it with --weights."""
    from safetensors.torch import save_file

    from shortcutflow.evaluation.runs import find_run
    from shortcutflow.posthoc import find_snapshots, posthoc_average

    if out.suffix != ".safetensors":
        raise ValueError(f"--out must name a .safetensors file, got {out}")
    folder = find_run(run)
    snapshots = find_snapshots(folder)
    if not snapshots:
        raise FileNotFoundError(
            f'{folder} holds no snapshots: train with averages.NAME=\'{{"sigma_rel":0.05,"snapshot_every":1000}}\''
        )
    step = snapshots[-1].step if step is None else step
    tensors = posthoc_average(snapshots, sigma_rel=sigma_rel, step=step)
    save_file(tensors, out, metadata={"sigma_rel": str(sigma_rel), "step": str(step)})
    print(f"{out}: width {sigma_rel:g} at step {step}, of {folder}")


@app.command("show-config")
def show_config_command(
    run_or_recipe: Annotated[str, typer.Argument(help="A run's folder, a recipe's name or its file.")],
    overrides: Overrides = None,
) -> None:
    """Print the complete config of a run or a recipe, as JSON."""
    from shortcutflow.config import with_overrides
    from shortcutflow.evaluation.runs import find_run

    if Path(run_or_recipe).is_dir():
        config = RunConfig.load(find_run(Path(run_or_recipe)))
    else:
        config = load_recipe(run_or_recipe)
    print(with_overrides(config, overrides or []).model_dump_json(indent=2))


@app.command("convert")
def convert_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the released JAX code, a pickle.")],
    out: Annotated[Path, typer.Option(help="The model's folder to write.")],
    heads: Annotated[int | None, typer.Option(help="Of attention. [default: found from the file]")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of a sample. [default: the usual one]")] = None,
    finest_steps: Annotated[int, typer.Option(help="The training's denoise_timesteps.")] = 128,
) -> None:
    """Turn a checkpoint of the released JAX code into safetensors and a config, without JAX."""
    from shortcutflow.interop.convert import convert

    config, notes = convert(checkpoint, out, heads=heads, image_size=image_size, finest_steps=finest_steps)
    for note in notes:
        print(f"assumed {note}")
    print(f"{out}: {config.backbone.name} {config.backbone.options}, samples {config.shape}, step {config.step}")


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="A model's or a run's folder.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[str, typer.Option(help="jax: a checkpoint of the released code.")] = "jax",
) -> None:
    """Write a model in a format that other code reads."""
    from shortcutflow.interop.export import export_jax

    if format != "jax":
        raise ValueError(f"unknown format {format!r}; known: jax")
    print(export_jax(folder, out))


def launch(config: RunConfig, argv: Sequence[str] | None = None) -> None:
    """Run a recipe file: the command line of ``shortcutflow train``, without the recipe's name."""
    recipe_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @recipe_app.command()
    def _recipe(
        overrides: Overrides = None,
        run_dir: RunDir = None,
        resume: Resume = False,
        smoke: Smoke = False,
        dry_run: DryRun = False,
        objective: ObjectiveName = None,
    ) -> None:
        run_recipe(config, overrides or [], Options(run_dir, resume, smoke, dry_run, objective))

    _call(recipe_app, sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The ``shortcutflow`` command."""
    _call(app, sys.argv[1:] if argv is None else argv)


def _call(typer_app: typer.Typer, argv: Sequence[str]) -> None:
    """Run a command; what a person can mend is one line on standard error and exit status 2."""
    try:
        typer_app(args=spread_lists(argv), standalone_mode=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except RuntimeError as error:
        if type(error) is RuntimeError:  # not one of ours: a defect, whose traceback is needed
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def spread_lists(argv: Sequence[str]) -> list[str]:
    """Repeat the option before each value of ``--steps 1 4 128``, which is the form the parser knows."""
    spread: list[str] = []
    option: str | None = None
    for word in argv:
        if word in LISTS:
            option = word
        elif word.startswith("--") or option is None:
            option = None
            spread.append(word)
        else:
            spread += [option, word]
    return spread


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe, from its file or by its name.

    Raises:
        ValueError: for an unknown name, listing the known ones, or a file without ``recipe()``.
    """
    if name.endswith(".py"):
        return _recipe_of_file(Path(name))()
    recipes = {entry.name: entry for entry in entry_points(group=RECIPE_GROUP)}
    if name not in recipes:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(sorted(recipes))}; or give a file, NAME.py")
    return recipes[name].load()()


def _recipe_of_file(path: Path) -> Callable[[], RunConfig]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "recipe", None)):
        raise ValueError(f"{path} is no recipe: it has no function recipe() -> RunConfig")
    return module.recipe
