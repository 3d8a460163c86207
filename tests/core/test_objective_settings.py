"""Settings of the objectives: what JSON keeps, what is refused, and that they do not change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

import shortcutflow as sf
from shortcutflow.objectives import ObjectiveConfig

UNION: TypeAdapter[BaseModel] = TypeAdapter(ObjectiveConfig)
SETTINGS = [
    sf.ShortcutObjective(finest_steps=64, bootstrap_fraction=0.5, guidance_scale=1.5, clip=3, condition_dropout=0.1),
    sf.ShortcutObjective.released(bootstrap_cfg=True, bootstrap_dt_bias=True),
    sf.FlowMatchingObjective(time_steps=32, condition_dropout=0.2, sigma_min=1e-3),
]


@pytest.mark.parametrize("objective", SETTINGS, ids=["shortcut", "released", "flow"])
def test_settings_survive_json(objective: BaseModel) -> None:
    assert UNION.validate_json(objective.model_dump_json()) == objective
    assert UNION.validate_json(UNION.dump_json(objective)) == objective
    assert UNION.validate_python({"kind": objective.model_dump()["kind"]}) != objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "shortcut", "bootstrap_every": 8}, "bootstrap_every"),
        ({"kind": "flow_matching", "finest_steps": 128}, "finest_steps"),
        ({"kind": "consistency"}, r"known: .*flow_matching, .*shortcut"),
        ({}, "kind"),
        ({"kind": "shortcut", "finest_steps": 100}, "power of two, at least 2, got 100"),
        ({"kind": "flow_matching", "time_steps": 1}, "power of two, at least 2, got 1"),
        ({"kind": "shortcut", "bootstrap_fraction": 1.5}, "bootstrap_fraction"),
        ({"kind": "shortcut", "clip": 0}, "clip"),
        ({"kind": "shortcut", "rows": "twice"}, "each_once"),
        ({"kind": "flow_matching", "condition_dropout": -0.1}, "condition_dropout"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNION.validate_python(settings)


@pytest.mark.parametrize("objective", SETTINGS, ids=["shortcut", "released", "flow"])
def test_settings_do_not_change(objective: BaseModel) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        objective.condition_dropout = 0.5  # type: ignore[attr-defined]
