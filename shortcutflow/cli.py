"""The ``shortcutflow`` command, and the command line of a recipe file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from shortcutflow.config import RunConfig
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
    weights: Annotated[str | None, typer.Option(help="An average's name, or 'current'. [default: the run's]")] = None,
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
