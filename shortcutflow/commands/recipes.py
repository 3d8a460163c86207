"""Recipes by name or file, and the options that every way of running one takes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shortcutflow import plugins
from shortcutflow.config import RunConfig

RECIPE_GROUP = "shortcutflow.recipes"

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Change the recipe.")]
RunDir = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME/DATE-TIME]")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir, or the newest of this recipe.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few steps and samples only, to see that everything works.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
ObjectiveName = Annotated[str | None, typer.Option("--objective", help="Short for objective.kind=NAME.")]


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe, from its file or by its name.

    Raises:
        ValueError: for an unknown name, listing the known ones, or a file without ``recipe()``.
    """
    if name.endswith(".py"):
        return _recipe_of_file(Path(name))()
    if name not in (known := plugins.names(RECIPE_GROUP)):
        raise ValueError(f"{plugins.unknown('recipe', name, known)}; or give a file, NAME.py")
    return plugins.load(RECIPE_GROUP, name, "recipe")()


def _recipe_of_file(path: Path) -> Callable[[], RunConfig]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes that the recipe defines look their annotations up
    spec.loader.exec_module(module)
    if not callable(getattr(module, "recipe", None)):
        raise ValueError(f"{path} is no recipe: it has no function recipe() -> RunConfig")
    return module.recipe
