"""Configs, overrides and scripts of earlier versions still work."""

from importlib import import_module

import pytest

import shortcutflow as sf
from recipes.digits import paper_recipe as recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.ema import EMAConfig
from shortcutflow.optim import OptimizerConfig


def test_a_config_with_old_field_names() -> None:
    values = recipe().model_dump(mode="json")
    values["averages"] = {"ema": {"decay": 0.5}}
    del values["emas"]
    assert RunConfig.model_validate(values).emas == {"ema": EMAConfig(decay=0.5)}


@pytest.mark.parametrize("override", ["averages.ema.decay=0.5", "emas.ema.decay=0.5"])
def test_an_override_with_an_old_field_name(override: str) -> None:
    assert with_overrides(recipe(), [override]).emas["ema"].decay == 0.5


@pytest.mark.parametrize("module", ["shortcutflow", "shortcutflow.ema"])
@pytest.mark.parametrize("old", ["Average", "AverageConfig"])
def test_an_old_name_of_a_module(module: str, old: str) -> None:
    place = import_module(module)
    with pytest.warns(DeprecationWarning, match=r"is now shortcutflow\S*\.EMA"):
        assert getattr(place, old) is getattr(sf, old.replace("Average", "EMA"))
    with pytest.raises(AttributeError, match="has no attribute 'NoSuch'"):
        getattr(place, "NoSuch")  # noqa: B009


def test_recipes_import_the_optimizer_from_its_former_place() -> None:
    assert import_module("shortcutflow.train.optim").OptimizerConfig is OptimizerConfig
