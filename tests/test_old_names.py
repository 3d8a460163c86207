"""Configs, overrides and scripts of earlier versions still work."""

import pytest

import shortcutflow as sf
from recipes.digits import recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.ema import EMAConfig


def test_a_config_with_old_field_names() -> None:
    values = recipe().model_dump(mode="json")
    values["averages"] = {"ema": {"decay": 0.5}}
    del values["emas"]
    assert RunConfig.model_validate(values).emas == {"ema": EMAConfig(decay=0.5)}


@pytest.mark.parametrize("override", ["averages.ema.decay=0.5", "emas.ema.decay=0.5"])
def test_an_override_with_an_old_field_name(override: str) -> None:
    assert with_overrides(recipe(), [override]).emas["ema"].decay == 0.5


@pytest.mark.parametrize("old", ["Average", "AverageConfig"])
def test_an_old_name_of_the_package(old: str) -> None:
    with pytest.warns(DeprecationWarning, match="is now shortcutflow.EMA"):
        assert getattr(sf, old) is getattr(sf, old.replace("Average", "EMA"))
