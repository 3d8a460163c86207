"""Runs with coupled noise: what a stop, accumulation and the settings change, and what not."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from recipes.digits import paper_recipe as recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.coupling import TransportCoupling
from shortcutflow.smoke import smoke
from shortcutflow.train.loop import train
from shortcutflow.train.nonfinite import NonFiniteError
from tests.train.launched import furthest_apart, tensors, tiny
from tests.train.test_nonfinite import break_data

COUPLED = ("coupling.kind=transport", "coupling.pool=30", "training.checkpoint_every=4")
"""Pools of three batches of 12."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "digits"


@pytest.fixture(scope="module")
def coupled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("coupled") / "run"
    train(tiny(shards, *COUPLED), run)
    return run


def test_resumed_inside_a_pool_equals_uninterrupted(coupled: Path, shards: Path, tmp_path: Path) -> None:
    for steps in (4, 5):
        train(tiny(shards, *COUPLED, f"training.steps={steps}"), tmp_path / "run", resume=True)
    expected, resumed = tensors(coupled, 5), tensors(tmp_path / "run", 5)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected), "bit for bit"


def test_accumulation_changes_nothing_and_the_coupling_something(coupled: Path, shards: Path, tmp_path: Path) -> None:
    train(tiny(shards, *COUPLED, "training.accumulation=2"), tmp_path / "in parts")
    train(tiny(shards), tmp_path / "independent")
    assert furthest_apart(tensors(coupled, 5), tensors(tmp_path / "in parts", 5)) < 1e-6
    assert furthest_apart(tensors(coupled, 5), tensors(tmp_path / "independent", 5)) > 1e-3


def test_an_error_of_the_thread_ends_the_run(shards: Path, tmp_path: Path) -> None:
    with (
        mock.patch("shortcutflow.coupling.couple", side_effect=MemoryError("a defect")),
        pytest.raises(MemoryError, match="a defect"),
    ):
        train(tiny(shards, *COUPLED), tmp_path / "run")


def test_a_sample_that_is_not_finite_is_named(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of its pool's batches; the assignment goes on with what it has."""
    read = break_data(monkeypatch, 2)
    with pytest.raises(NonFiniteError, match=r"^step 2: not finite") as caught:
        train(tiny(shards, *COUPLED), tmp_path / "run")
    assert f"the data of {read[2].keys[2]} is not finite" in str(caught.value)


def test_without_scipy_there_is_no_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'shortcutflow\[train\]'"):
        train(tiny(shards, *COUPLED), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings(coupled: Path) -> None:
    assert recipe().coupling is None
    on = with_overrides(recipe(), ["coupling.pool=500", "coupling.kind=transport"])
    assert on.coupling == TransportCoupling(pool=500)
    assert with_overrides(on, ["coupling=null"]).coupling is None
    assert with_overrides(on, ["coupling.per_class=false"]).coupling == TransportCoupling(pool=500, per_class=False)
    assert RunConfig.load(coupled).coupling == TransportCoupling(pool=30)
    small = smoke(on).coupling
    assert small is not None
    assert small.pool < 64


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["coupling.pool=5"], "coupling is null; give coupling.kind=... beside it"),
        (["coupling.kind=transprot"], "unknown coupling 'transprot'; did you mean 'transport'"),
        (["coupling.kind=transport", "coupling.pool=1"], "coupling.pool: Input should be greater than or equal to 2"),
        (["coupling.kind=transport", "coupling.pol=9"], "did you mean 'pool'"),
        (["coupling.kind=transport", "objective.rows=released"], "the released rows need noise of their own"),
        (["coupling.kind=transport", "objective.kind=reflow", "teacher=runs/flow"], "use coupling=null"),
    ],
)
def test_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        with_overrides(recipe(), overrides)
