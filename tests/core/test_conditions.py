"""Conditions as trees of tensors: rows of every part stay together, and labels behave as they always did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Generator, Tensor

import shortcutflow as sf
from shortcutflow import conditions
from shortcutflow.objectives import ObjectiveConfig
from tests.core.networks import affine

TEXT = {
    "tokens": torch.arange(48).view(12, 4),
    "mask": torch.arange(48).view(12, 4) % 3 > 0,
    "more": {"vector": torch.linspace(0, 1, 12).view(12, 1)},
}
NULL = {"tokens": -1, "mask": torch.zeros(4, dtype=torch.bool), "more": {"vector": torch.tensor([5.0])}}


def test_rows_are_selected_and_concatenated_together() -> None:
    rows = torch.tensor([3, 0, 3])
    picked = conditions.select(TEXT, rows)
    assert torch.equal(picked["tokens"], TEXT["tokens"][rows])
    assert torch.equal(picked["more"]["vector"], TEXT["more"]["vector"][rows])
    both = conditions.concatenate(conditions.select(TEXT, slice(5)), conditions.select(TEXT, slice(5, None)))
    assert all(torch.equal(both[name], TEXT[name]) for name in ("tokens", "mask"))
    assert conditions.select(None, rows) is conditions.concatenate(None, None) is conditions.to(None, "cpu") is None


def test_dropped_rows_have_the_null_condition_in_every_part() -> None:
    dropped = torch.arange(12) % 2 == 0
    y = conditions.drop(TEXT, dropped, NULL)
    assert (y["tokens"][dropped] == -1).all()
    assert not y["mask"][dropped].any()
    assert (y["more"]["vector"][dropped] == 5).all()
    assert torch.equal(y["tokens"][~dropped], TEXT["tokens"][~dropped])
    null = conditions.null_like(TEXT, NULL)
    assert null["tokens"].shape == (12, 4)
    assert null["mask"].dtype == torch.bool
    assert torch.equal(conditions.drop(TEXT, dropped | True, NULL)["more"]["vector"], null["more"]["vector"])


@pytest.mark.parametrize("null", [7, {"tokens": -1}, {**NULL, "extra": 0}], ids=["number", "too few", "too many"])
def test_a_null_condition_of_another_structure_is_refused(null: Any) -> None:
    with pytest.raises(ValueError, match=r"has the parts \['mask', 'more', 'tokens'\]"):
        conditions.null_like(TEXT, null)


def test_a_part_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"data has 12, y\['more'\]\['vector'\] has shape \(11, 1\)"):
        conditions.check_rows({**TEXT, "more": {"vector": torch.zeros(11, 1)}}, 12)
    with pytest.raises(ValueError, match="or a mapping of names to such, got str"):
        conditions.as_condition({"text": "a cat"}, "cpu")


def test_whole_numbers_become_labels_in_every_part() -> None:
    y = conditions.as_condition(
        {"label": [1, 2], "flag": torch.tensor([True, False]), "image": torch.zeros(2, 3)}, "cpu"
    )
    assert y["label"].dtype == y["flag"].dtype == torch.int64
    assert y["image"].dtype == torch.float32


def by_tree(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
    """The affine network, its label taken out of a tree."""
    assert torch.equal(y["label"], y["again"]["label"]), "the parts of a row stay together"
    return affine(x_t, t, d, y["label"])


SETTINGS: list[dict[str, Any]] = [
    {"kind": "shortcut", "guidance_scale": 2.0},
    {"kind": "shortcut", "guidance_scale": 2.0, "flow_of": "teacher"},
    {"kind": "shortcut", "guidance_scale": 2.0, "rows": "released"},
    {"kind": "flow_matching"},
    {"kind": "consistency_training"},
    {"kind": "consistency_distillation", "guidance_scale": 2.0},
    {"kind": "progressive_distillation", "guidance_scale": 2.0},
    {"kind": "reflow", "guidance_scale": 2.0, "rows_per_pair": 2, "teacher_steps": 3},
    {"kind": "live_reflow", "guidance_scale": 2.0, "rows": "released"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['kind']}")
def test_a_tree_of_labels_gives_the_numbers_of_labels(settings: dict[str, Any]) -> None:
    """In every objective and in the sampler; the negative control has other labels in the tree."""
    objective: Any = TypeAdapter(ObjectiveConfig).validate_python(settings | {"condition_dropout": 0.3})
    data, y = torch.randn(24, 2, generator=Generator().manual_seed(0)), torch.arange(24)

    def losses(net: Any, y: Any, null: Any) -> Tensor:
        return objective(
            net, data, y, teacher=net, null_y=null, progress=0.1, generator=Generator().manual_seed(1)
        ).row_loss

    tree, null = {"label": y, "again": {"label": y}}, {"label": 30, "again": {"label": 30}}
    other = {"label": y + 1, "again": {"label": y + 1}}
    expected = losses(affine, y, 30)
    assert torch.equal(losses(by_tree, tree, null), expected)
    assert not torch.equal(losses(by_tree, other, null), expected)
    samples = sf.sample(affine, data, y, steps=3, guidance_scale=1.5, null_y=30)
    assert torch.equal(sf.sample(by_tree, data, tree, steps=3, guidance_scale=1.5, null_y=null), samples)
