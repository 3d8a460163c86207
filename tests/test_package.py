"""The package: what is in it, and what a person without any extra gets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import shortcutflow
from shortcutflow.cli import EXTRA_OF

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED = {"shortcutflow", "backbones", "recipes"}

# Runs commands with nothing installed but the core dependencies: by what an import finds, as far as it can tell.
WITHOUT_EXTRAS = """
import contextlib, io, json, sys
for name in {blocked}:
    sys.modules[name] = None
from pathlib import Path
from shortcutflow.cli import main
from shortcutflow.models.config import ModelConfig
from shortcutflow.models.model import Model
from shortcutflow.network import BackboneConfig

backbone = BackboneConfig(name="dit", options={{"patch": 2, "width": 16, "depth": 1, "heads": 2}})
config = ModelConfig(
    backbone=backbone, shape=(1, 8, 8), num_classes=10, weights=("current",), default_weights="current"
)
Model(config.build_network().eval(), config, "current", Path("."), "small").save("model")
Path("images").mkdir()
Path("images/a.png").touch()
result = {{}}
for command in {commands}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command.split())
        except SystemExit as stop:
            status = stop.code
    result[command] = [status, out.getvalue(), err.getvalue()]
print(json.dumps(result))
"""


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", str(folder))
    return folder


def test_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    (about,) = {name.split("/")[0] for name in names} - IMPORTED
    assert about.endswith(".dist-info")
    in_checkout = {str(path.relative_to(ROOT)) for package in IMPORTED for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == in_checkout
    assert {name for name in names if not name.endswith(".py") and not name.startswith(about)} == {
        "shortcutflow/py.typed", "backbones/py.typed",
    }  # fmt: skip


def test_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.stat().st_size < 2_000_000
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert top == IMPORTED | {
        "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip


def test_index_takes_them(built: Path) -> None:
    assert run("-m", "twine", "--no-color", "check", "--strict", *map(str, built.iterdir())).count("PASSED") == 2


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {shortcutflow.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_extra_names_packages_it_holds() -> None:
    """An import that fails is answered with an extra, which brings the package of that name."""
    extras = {
        name: {Requirement(line).name for line in lines} for name, lines in PROJECT["optional-dependencies"].items()
    }
    distributions = packages_distributions()
    for module, extra in EXTRA_OF.items():
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module.replace("_", "-")])}
        assert names & (extras[extra] | {"clean-fid" if module == "cleanfid" else ""}), (module, extra)


def test_all_is_every_extra_that_a_cpu_takes() -> None:
    extras = PROJECT["optional-dependencies"]
    (itself,) = extras["all"]
    held = Requirement(itself).extras | {"train"}  # which the others hold
    assert held == set(extras) - {"all", "dev", "docs", "eval", "mamba"}


COMMANDS = {
    "--help": (0, "train"),
    "show-config digits": (0, '"name": "digits"'),
    "train digits": (2, "pip install 'shortcutflow[digits]'"),
    "train unet_cifar10 --smoke": (2, "pip install 'shortcutflow[train]'"),
    "train policy_sequences": (2, "pip install 'shortcutflow[policy]'"),
    "prepare images shards --size 8": (2, "pip install 'shortcutflow[train]'"),
    "prepare images shards --size 8 --latents": (2, "pip install 'shortcutflow[latents]'"),
    "sample runs/nowhere": (2, "there is no run at runs/nowhere"),
    "sample owner/name": (2, "pip install 'shortcutflow[hub]'"),
    "sample model": (2, "pip install 'shortcutflow[train]'"),
    "evaluate runs/nowhere": (2, "there is no run at runs/nowhere"),
    "evaluate model --protocol digits --metrics label_accuracy": (2, "pip install 'shortcutflow[digits]'"),
    "evaluate model --protocol clean-fid": (2, "pip install 'shortcutflow[eval]'"),
    "plot trajectory model": (2, "pip install 'shortcutflow[train]'"),
    "plot quality report.json": (2, "pip install 'shortcutflow[plot]'"),
    "demo model": (2, "pip install 'shortcutflow[demo]'"),
    "average nowhere --sigma-rel 0.1 --out w.safetensors": (2, "there is no run at nowhere"),
    "convert owner/name --out converted": (2, "pip install 'shortcutflow[hub]'"),
    "export model --out m.pt2 --format torch": (0, "m.pt2"),
    "export model --out m.onnx --format onnx": (2, "pip install 'shortcutflow[onnx]'"),
    "export model --out pipe --format diffusers": (2, "pip install 'shortcutflow[latents]'"),
}


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """For each command its status, output and errors."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "report.json").write_text('{"rows": [{"steps": 1, "values": {"fid": 1.0}}]}')
    code = WITHOUT_EXTRAS.format(blocked=[*EXTRA_OF, "torchvision"], commands=list(COMMANDS))
    done: dict[str, tuple[int, str, str]] = json.loads(run("-c", code, cwd=folder).splitlines()[-1])
    assert {path.name for path in folder.iterdir()} == {"images", "model", "report.json", "m.pt2"}, "no run is begun"
    return done


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_works_or_names_its_extra(without_extras: dict[str, tuple[int, str, str]], command: str) -> None:
    (status, says), (given, out, err) = COMMANDS[command], without_extras[command]
    assert given == status, err
    assert says in (err if status else out)
    assert not status or re.fullmatch(r"error: .*\n", err), "one line"
