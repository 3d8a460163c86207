"""What other packages add: found by entry point or by being defined, named in configs, never imported by a config."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from recipes.digits import paper_recipe as recipe
from shortcutflow import plugins
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data import DATA_SOURCES
from shortcutflow.data.digits import DigitsData
from shortcutflow.network import BACKBONE_GROUP, build_network
from shortcutflow.objectives.shortcut import ShortcutObjective

SOURCE = """
from typing import Literal
from shortcutflow.data import DigitsData

class Elsewhere(DigitsData):
    kind: Literal["elsewhere"] = "elsewhere"
    brightness: float = 1.0

class Nameless(DigitsData):
    brightness: float = 1.0

def net(**options):
    raise ValueError("built elsewhere")

BUILDERS = {"their_net": net}
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with one module and its entry points where the running program finds it; returns its name."""
    installed: list[str] = []

    def put(entries: dict[str, str], source: str = SOURCE) -> str:
        name = f"plugin_{tmp_path.name}_{len(installed)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[{group}]\n{entry.replace('MODULE', name)}\n" for group, entry in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        installed.append(name)
        return name

    yield put
    for name in installed:
        sys.modules.pop(name, None)


def values(**data: Any) -> dict[str, Any]:
    return recipe().model_dump(mode="json") | {"data": data}


def test_a_kind_of_an_installed_package(install: Install) -> None:
    with pytest.raises(ValidationError, match="unknown kind of data source 'elsewhere'; known: digits, "):
        RunConfig.model_validate(values(kind="elsewhere"))
    name = install({"shortcutflow.data": "elsewhere = MODULE:Elsewhere"})
    assert name not in sys.modules
    config = RunConfig.model_validate(values(kind="elsewhere", brightness=2))
    assert config.data.model_dump()["brightness"] == 2
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert "elsewhere" in DATA_SOURCES.known()
    with pytest.raises(ValidationError, match=r"data\.brightness\n"):
        RunConfig.model_validate(values(kind="elsewhere", brightness="dark"))
    changed = with_overrides(recipe(), ["data.kind=elsewhere", "data.brightness=3", "data.workers=1"])
    assert changed.data.model_dump()["brightness"] == 3
    with pytest.raises(ValueError, match="data has no field 'brigthness'; did you mean 'brightness'"):
        with_overrides(changed, ["data.brigthness=3"])
    assert isinstance(with_overrides(changed, ["data.kind=digits"]).data, DigitsData)


def test_objects_of_the_running_program_need_no_entry_point() -> None:
    class Brighter(DigitsData):
        kind: Literal["brighter"] = "brighter"
        brightness: float = 1.0

    config = recipe().model_copy(update={"data": Brighter(brightness=2)})
    changed = with_overrides(config, ["data.brightness=3"])
    assert isinstance(changed.data, Brighter)
    assert changed.data.brightness == 3
    assert RunConfig.model_validate(changed.model_dump(mode="json")).data == changed.data


def test_a_class_that_would_be_read_back_as_another_is_refused() -> None:
    class Louder(ShortcutObjective):
        """Has the kind of its base class, so a saved config would not know it."""

    given = {**recipe().model_dump(), "objective": Louder(finest_steps=8)}
    with pytest.raises(ValidationError, match="Louder would be read back as ShortcutObjective, which has its kind"):
        RunConfig.model_validate(given)


@pytest.mark.parametrize("kind", ["os", "os:system", "tests.test_plugins:Brighter", "", None, 3, ["digits"]])
def test_a_config_imports_nothing(kind: Any) -> None:
    with pytest.raises(ValidationError, match="unknown kind of data source"):
        RunConfig.model_validate(values(kind=kind))


def test_a_section_without_a_kind() -> None:
    with pytest.raises(ValidationError, match=r"unknown kind of data source None; known: .*digits"):
        RunConfig.model_validate(values(folder="x"))
    with pytest.raises(ValidationError, match=r"data source must be an object with a kind, got 'digits'"):
        RunConfig.model_validate(recipe().model_dump() | {"data": "digits"})


def test_entry_points_that_name_something_else(install: Install) -> None:
    name = install({"shortcutflow.data": "nameless = MODULE:Nameless\nbuilder = MODULE:net\ngone = MODULE:missing"})
    for kind in ("nameless", "builder"):
        with pytest.raises(ValueError, match=f"entry point '{kind}' of shortcutflow.data must name a subclass of Data"):
            DATA_SOURCES.find(kind)
    with pytest.raises(ImportError, match=rf"data source 'gone' \({name}:missing\) cannot be imported: .*missing"):
        DATA_SOURCES.find("gone")


def test_names_that_two_packages_have(install: Install) -> None:
    entries = {"shortcutflow.data": "twice = MODULE:Elsewhere", BACKBONE_GROUP: "all = MODULE:BUILDERS"}
    first, second = install(entries), install(entries)
    with pytest.raises(ValueError, match=f"'twice' is defined 2 times, by {first}:Elsewhere and {second}:Elsewhere"):
        plugins.load("shortcutflow.data", "twice", "data source")
    config = recipe().backbone.model_copy(update={"name": "their_net"})
    with pytest.raises(ValueError, match=f"backbone 'their_net' is defined 2 times, by {first}:BUILDERS and {second}"):
        build_network(config, shape=(1, 8, 8), num_classes=None, finest_steps=8, seed=0)


def test_a_backbone_of_an_installed_package(install: Install) -> None:
    config = recipe().backbone.model_copy(update={"name": "their_net"})
    with pytest.raises(ValueError, match=r"unknown backbone 'their_net'; known: .*dit"):
        build_network(config, shape=(1, 8, 8), num_classes=None, finest_steps=8, seed=0)
    install({BACKBONE_GROUP: "all = MODULE:BUILDERS"})
    config = config.model_copy(update={"options": {}})
    with pytest.raises(ValueError, match="built elsewhere"):
        build_network(config, shape=(1, 8, 8), num_classes=None, finest_steps=8, seed=0)


def test_unknown_names_of_a_group_that_nothing_is_in() -> None:
    with pytest.raises(ValueError, match="unknown logger 'x'; known: none: no package that has one is installed"):
        plugins.load("shortcutflow.nothing", "x", "logger")
