"""Names for networks: creating, listing, registering, and builders that another installed package brings."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import backbones
from backbones import registry
from backbones.dit import DiT

TINY = {"shape": (3, 8, 8), "width": 32, "depth": 1, "heads": 2}


@pytest.fixture(autouse=True)
def registry_as_before() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(registry.BUILDERS)
    yield
    registry.BUILDERS.clear()
    registry.BUILDERS.update(before)


def tiny_linear(*, shape: tuple[int, ...], num_classes: int | None = None, finest_steps: int = 128) -> nn.Module:
    return nn.Linear(shape[-1], shape[-1])


# ---- create and names


def test_create_builds_what_the_name_says() -> None:
    net = backbones.create("dit", **TINY, num_classes=7, finest_steps=32)
    assert isinstance(net, DiT)
    assert (net.shape, net.condition.num_classes, net.condition.finest_steps) == ((3, 8, 8), 7, 32)
    first: Any = net.blocks[0]
    assert (len(net.blocks), first.mixer.heads) == (1, 2)
    other = backbones.create("dit_s_4", shape=(3, 8, 8), depth=2)
    assert isinstance(other, DiT)
    assert (other.patch, len(other.blocks)) == (4, 2), "a preset's options give way to those of the call"


def test_names_are_sorted_and_can_be_asked_for_again() -> None:
    names = backbones.names()
    assert {"dit", "dit_b_2"} <= set(names)
    assert names == sorted(set(names)) == backbones.names()
    assert "tiny_linear" not in names


@pytest.mark.parametrize("name", ["dit_b2", "", "DiT", "backbones.dit:DiT", "os.system"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    """Among them paths of modules: a name is never imported."""
    with pytest.raises(ValueError, match=f"unknown backbone '{name}'") as raised:
        backbones.create(name, **TINY)
    assert f"known: {', '.join(backbones.names())}" in str(raised.value)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'dit_b_2'\?"):
        backbones.create("dit_b2", **TINY)
    with pytest.raises(ValueError, match="unknown backbone") as raised:
        backbones.create("zzzzzz", **TINY)
    assert "did you mean" not in str(raised.value)


def test_an_option_that_the_builder_lacks_is_named() -> None:
    with pytest.raises((TypeError, ValueError), match="widht"):
        backbones.create("dit", **TINY, widht=64)


# ---- register


def test_register() -> None:
    assert backbones.register("tiny_linear")(tiny_linear) is tiny_linear
    assert "tiny_linear" in backbones.names()
    net = backbones.create("tiny_linear", shape=(3, 8, 5))
    assert isinstance(net, nn.Linear)
    assert net.in_features == 5


def test_a_name_is_taken_once() -> None:
    backbones.register("tiny_linear")(tiny_linear)
    put_again = backbones.register("tiny_linear")
    with pytest.raises(ValueError, match=r"backbone 'tiny_linear' is registered already, by .*tiny_linear"):
        put_again(nn.Linear)
    put_dit = backbones.register("dit")
    with pytest.raises(ValueError, match="'dit' is registered already"):
        put_dit(tiny_linear)
    assert isinstance(backbones.create("tiny_linear", shape=(2,)), nn.Linear)
    assert isinstance(backbones.create("dit", **TINY), DiT)


# ---- other packages

MODULE = """
from torch import nn

def wide(*, shape, num_classes=None, finest_steps=128, factor=2):
    return nn.Linear(shape[-1], factor * shape[-1])

BUILDERS = {"elsewhere_wide": wide, "elsewhere_same": lambda **options: wide(**options, factor=1)}
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with an entry point for backbones, as an installer leaves it; gives its module's name."""
    module = "elsewhere_backbones"
    (tmp_path / f"{module}.py").write_text(MODULE)
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\nelsewhere = {module}:BUILDERS\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield module
    sys.modules.pop(module, None)


def create_elsewhere(**options: Any) -> nn.Module:
    return backbones.create("elsewhere_wide", shape=(4,), **options)


def test_without_the_package_its_names_are_unknown() -> None:
    assert not any(name.startswith("elsewhere") for name in backbones.names())
    with pytest.raises(ValueError, match="unknown backbone 'elsewhere_wide'"):
        create_elsewhere()


def test_names_of_an_installed_package(installed: str) -> None:
    assert {"elsewhere_wide", "elsewhere_same", "dit"} <= set(backbones.names())
    assert backbones.names() == sorted(set(backbones.names()))
    wide, same = create_elsewhere(factor=3), backbones.create("elsewhere_same", shape=(4,))
    assert isinstance(wide, nn.Linear)
    assert isinstance(same, nn.Linear)
    assert (wide.out_features, same.out_features) == (12, 4)


def test_an_installed_package_is_part_of_the_hints(installed: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'elsewhere_wide'\? known: .*elsewhere_same"):
        backbones.create("elsewhere_wid", shape=(4,))


def test_own_names_are_created_without_importing_other_packages(installed: str) -> None:
    assert isinstance(backbones.create("dit", **TINY), DiT)
    assert installed not in sys.modules
    create_elsewhere()
    assert installed in sys.modules
