"""The ``shortcutflow`` command, and the command line of a recipe file."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer
from pydantic import ValidationError

from shortcutflow.commands.data import prepare_command
from shortcutflow.commands.demo import demo_command
from shortcutflow.commands.evaluate import evaluate_command
from shortcutflow.commands.models import convert_command, export_command
from shortcutflow.commands.plot import plot_app
from shortcutflow.commands.recipes import DryRun, ObjectiveName, Overrides, Resume, RunDir, Smoke
from shortcutflow.commands.training import average_command, sample_command, show_config_command, train_command
from shortcutflow.config import RunConfig
from shortcutflow.launch import Options, run_recipe

if TYPE_CHECKING:
    from shortcutflow.train.loggers import Logger

NUMBER = re.compile(r"[\d.,e+-]+")
METRIC = re.compile(r"(fid|kid|is|precision|recall|density|coverage|label_accuracy|,)+")
LISTS = {"--steps": NUMBER, "--labels": NUMBER, "--metrics": METRIC}
"""Options that take several values: ``--steps 1 4 128`` is ``--steps 1 --steps 4 --steps 128``. After the first value
the list ends at a word that cannot be one, such as a run's folder."""
SPEAK_PLAINLY = ("shortcutflow", "backbones", "recipes", "pydantic", "huggingface_hub")
"""Packages whose errors tell the user what to change; an error of any other keeps its traceback."""
TRACEBACK = "--traceback"
NEEDS = {"int_parsing": "it must be a whole number", "float_parsing": "it must be a number"}
"""What an option must be, in place of pydantic's words for it."""
EXTRA_OF = {
    "PIL": "train",
    "cleanfid": "eval",
    "diffusers": "latents",
    "gradio": "demo",
    "gym_pusht": "policy",
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pyarrow": "parquet",
    "scipy": "train",
    "sklearn": "digits",
    "tensorboard": "train",
    "webdataset": "train",
    "x_transformers": "transformer",
}
"""Which extra of this package brings a package, by the name that is imported; pyproject.toml says what each holds."""

app = typer.Typer(
    epilog="--traceback with any command shows where an error came from.",
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip


@app.callback()
def _about() -> None:
    """Shortcut models: train one network, sample it in any number of steps."""


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare_command,
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "demo": demo_command,
    "average": average_command,
    "convert": convert_command,
    "export": export_command,
    "show-config": show_config_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(plot_app, name="plot")


def launch(config: RunConfig, argv: Sequence[str] | None = None, loggers: Sequence[Logger] = ()) -> None:
    """Run a recipe file: the command line of ``shortcutflow train``, without the recipe's name.

    ``loggers`` receive numbers and images besides those that the config names; see shortcutflow/train/loggers.py.
    """
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
        run_recipe(config, overrides or [], Options(run_dir, resume, smoke, dry_run, objective), loggers)

    _call(recipe_app, sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The ``shortcutflow`` command."""
    _call(app, sys.argv[1:] if argv is None else argv, prog_name="shortcutflow")


def _call(typer_app: typer.Typer, argv: Sequence[str], prog_name: str | None = None) -> None:
    """Run a command; an error that tells the user what to change is one line on standard error.

    The exit status is then 2, or 1 for what went wrong during a run. Any other error keeps its traceback, and with
    ``--traceback`` each does.
    """
    words = spread_lists([word for word in argv if word != TRACEBACK])
    try:
        status = typer_app(args=words, prog_name=prog_name, standalone_mode=False)
    except typer.Abort:
        raise SystemExit(1) from None
    except Exception as error:
        message = _usage(error) or _remedy(error) or (str(error) if says_what_to_change(error) else None)
        if TRACEBACK in argv or message is None:
            raise
        print(message if message.startswith("Usage: ") else f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from error
    raise SystemExit(status or 0)


def _usage(error: Exception) -> str | None:
    """What is wrong with the words of a command, or the whole help where there are none; None for other errors."""
    if not hasattr(error, "format_message"):  # the parser's errors, whose class is not public in every typer
        return None
    text: str = error.format_message()
    if text.startswith("Usage: "):
        return text
    if isinstance(error.__cause__, ValidationError):
        wrong = error.__cause__.errors()[0]
        text = f"{text.partition(': ')[0]}: {NEEDS.get(wrong['type'], wrong['msg'])}, got {wrong['input']!r}"
    text = text.partition(" (Possible")[0].rstrip(".")
    context = getattr(error, "ctx", None)
    return text if text.endswith("?") or context is None else f"{text}; see {context.command_path} --help"


def _remedy(error: BaseException) -> str | None:
    """A sentence that names the extra to install, where a failed import does not say it itself; else None."""
    if not isinstance(error, ImportError) or "pip install" in str(error):
        return None
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, ModuleNotFoundError) and cause.name):
        cause = cause.__cause__
    package = str(cause.name).partition(".")[0] if isinstance(cause, ModuleNotFoundError) else None
    if package not in EXTRA_OF:
        return None
    return f"this needs {package}, which is not installed: pip install 'shortcutflow[{EXTRA_OF[package]}]'"


def says_what_to_change(error: Exception) -> bool:
    """Whether an error is a full disk, or this library raised it, itself or through the standard library."""
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if isinstance(error, RuntimeError):  # the base class is for defects, the library's own classes for the user
        return type(error).__module__.partition(".")[0] in SPEAK_PLAINLY
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    return [name for name in packages if name not in sys.stdlib_module_names][-1] in SPEAK_PLAINLY


def spread_lists(argv: Sequence[str]) -> list[str]:
    """Repeat the option before each value of ``--steps 1 4 128``, which is the form the parser knows."""
    spread: list[str] = []
    option: str | None = None
    is_first = False
    for word in argv:
        if word in LISTS:
            option = word
            is_first = True
        elif option is not None and (is_first or LISTS[option].fullmatch(word)) and not word.startswith("--"):
            spread += [option, word]
            is_first = False
        else:
            option = None
            spread.append(word)
    return spread
