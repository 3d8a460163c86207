"""The ``shortcutflow`` command, and the command line of a recipe file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

from shortcutflow.commands.data import prepare_command
from shortcutflow.commands.evaluate import evaluate_command
from shortcutflow.commands.models import convert_command, export_command
from shortcutflow.commands.plot import plot_app
from shortcutflow.commands.recipes import DryRun, ObjectiveName, Overrides, Resume, RunDir, Smoke
from shortcutflow.commands.training import average_command, sample_command, show_config_command, train_command
from shortcutflow.config import RunConfig
from shortcutflow.launch import Options, run_recipe

LISTS = ("--steps", "--labels", "--metrics")
"""Options that take several values: ``--steps 1 4 128`` is ``--steps 1 --steps 4 --steps 128``."""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Shortcut models: train one network, sample it in any number of steps."""


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare_command,
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "average": average_command,
    "convert": convert_command,
    "export": export_command,
    "show-config": show_config_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(plot_app, name="plot")


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
