"""The pages of the documentation: their Python runs, their commands parse, what they name exists.

The README too, but for its Python, which test_readme.py trains to the end.

A page is followed from top to bottom in an empty folder. Python blocks share one namespace; a block with a title is
written to a file of this name, and a ``pyproject.toml`` is installed as pip would. Three comments change this:
``<!-- not run: REASON -->`` before a block leaves it out, ``<!-- run -->`` before a bash block runs its commands rather
than parse them, and ``<!-- before: CODE -->`` is Python that the reader does not see.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import typer

from shortcutflow.cli import app, main, spread_lists
from shortcutflow.commands.recipes import load_recipe
from shortcutflow.config import with_overrides
from shortcutflow.evaluation.features.protocols import check_protocol
from shortcutflow.evaluation.metrics import check_request

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCK = re.compile(
    r"<!-- before:\n(?P<before>.*?)-->"
    r"|(?:<!-- (?P<note>not run: .+?|run) -->\n)?^ *```(?P<language>\w*)(?: title=\"(?P<title>[\w./]+)\")?.*?\n"
    r"(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page, or Python before one that the reader does not see."""

    language: str
    code: str
    title: str | None
    note: str | None
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("before" if found["before"] else "code"))
        if found["before"]:
            yield Block("python", found["before"], None, None, line)
        else:
            yield Block(found["language"], found["code"], found["title"], found["note"], line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_can_be_followed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)
    known = set(sys.modules)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks_of(page):
            if block.title is not None:
                write(Path(block.title), block.code)
            elif block.language == "python" and block.note is None and page.name != "README.md":
                # Lines of an error are those of the page.
                exec(compile("\n" * block.line + block.code, page, "exec"), vars(namespace))
            elif block.language == "bash":
                for words in commands_of(block.code):
                    follow(words, run=block.note == "run")
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(path: Path, text: str) -> None:
    """A file of the page; a pyproject.toml leaves the entry points that pip would write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if path.name == "pyproject.toml":
        project = tomllib.loads(text)["project"]
        info = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [
            line
            for group, entries in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    elif path.suffix == ".py":
        compile(text, str(path), "exec")


def commands_of(script: str) -> Iterator[list[str]]:
    """The commands of a bash block, each as its words."""
    so_far = ""
    for line in script.replace("\\\n", " ").splitlines():
        so_far += line + "\n"
        try:
            words = shlex.split(so_far, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        so_far = ""
        if words:
            yield words


def follow(words: Sequence[str], *, run: bool) -> None:
    """Check one command, or run it."""
    for extras in re.findall(r"(?:shortcutflow|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"]), words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    for i, word in enumerate(words):
        argv = [word for word in words[i + 1 :] if not word.startswith("$") and word != "&"]
        if word == "shortcutflow" and (i == 0 or words[i - 1] == "-m"):
            if run:
                succeed(argv)
            else:
                parse(argv)
        elif re.fullmatch(r"(recipes/)?[\w/]+\.py", word) and "python" in words[0] + "".join(words[:i]):
            run_python(word, argv, run=run)


def run_python(file: str, argv: Sequence[str], *, run: bool) -> None:
    if run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [file, *argv])
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(file, run_name="__main__")
            assert stop.value.code == 0, argv
    elif file.startswith("recipes/") or Path(file).exists():
        parse(["train", file if Path(file).exists() else str(ROOT / file), *argv])
    else:
        assert (ROOT / file).exists(), file


def succeed(argv: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0, argv


@cache
def whole_command() -> Any:
    return typer.main.get_command(app)


def parse(argv: Sequence[str]) -> None:
    """Subcommand, options and their types; of recipes also the overrides, of evaluations protocol and metrics."""
    command: Any = whole_command()
    words, name = spread_lists(argv), "shortcutflow"
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(words))
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    context = command.make_context(name, list(words))
    params = context.params
    recipe = params.get("recipe", params.get("run_or_recipe"))
    if recipe is not None and not Path(recipe).is_dir() and not recipe.startswith("runs/"):
        kind = [f"objective.kind={name}" for name in [params.get("objective")] if name is not None]
        with_overrides(load_recipe(recipe), [*kind, *(params["overrides"] or [])])
    if "protocol" in params and "metrics" in params:
        if not params["protocol"].startswith("file:"):
            check_protocol(params["protocol"])
        metrics = tuple(name for words in params["metrics"] or ["fid"] for name in words.split(","))
        check_request(tuple(params["steps"] or [1]), metrics, params["samples"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:docs|benchmarks|recipes|tests|shortcutflow|backbones)/[\w./]+\w)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "package", ["shortcutflow", "shortcutflow.objectives", "shortcutflow.config", "shortcutflow.data", "backbones"]
)
def test_every_public_name_is_documented(package: str) -> None:
    """Once, under this package or another that has the same object."""
    shown = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
    assert len(set(shown)) == len(shown)
    public = {
        name: getattr(importlib.import_module(package), name) for name in importlib.import_module(package).__all__
    }
    places = {name: [place for place in shown if place.endswith(f".{name}")] for name in public}
    assert [n for n, at in places.items() if not any(pkgutil.resolve_name(place) is public[n] for place in at)] == []
