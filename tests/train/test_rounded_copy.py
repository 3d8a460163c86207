"""Targets from weights that are kept in bfloat16: bit for bit those from the weights themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from shortcutflow.train import state
from shortcutflow.train.loop import train
from shortcutflow.train.parallel import RoundedCopy
from tests.backbones_contract.cases import FIRST, Case, params
from tests.train.launched import tensors, tiny

BFLOAT16 = "training.precision=bfloat16"
CURRENT = "target_weights=current"


def equal(one: Path, other: Path, step: int) -> bool:
    mine, theirs = tensors(one, step), tensors(other, step)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@params(FIRST)
@torch.no_grad()
def test_it_computes_what_the_network_does(case: Case) -> None:
    network, inputs = case.awake(), case.inputs()
    copy = RoundedCopy(network)

    def computed(net: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # which keeps its casts of a weight to its end
            return net(*inputs)

    before = computed(network)
    assert torch.equal(computed(copy.network), before)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    copy.refresh()
    after = computed(network)
    assert not torch.equal(after, before)
    assert torch.equal(computed(copy.network), after)


def test_only_what_autocast_rounds_is_rounded() -> None:
    """The embeddings of t and d, which stay float32 under autocast, and the buffers are the network's own."""
    case = next(case for case in FIRST if case.family == "dit")
    network = case.awake()
    originals: dict[str, Any] = dict([*network.named_parameters(), *network.named_buffers()])
    copy = RoundedCopy(network).network
    for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
        if name.startswith("blocks."):
            assert tensor.dtype == torch.bfloat16
            assert not tensor.requires_grad
        else:
            assert tensor is originals[name]
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("weights", ["target_weights=ema", CURRENT])
def test_a_run_has_the_numbers_of_one_without_it(weights: str, shards: Path, tmp_path: Path) -> None:
    """And a copy that is left as it was is noticed."""
    config = tiny(shards, BFLOAT16, weights)
    train(config, tmp_path / "with")
    with mock.patch.object(RoundedCopy, "refresh"):
        train(config, tmp_path / "stale")
    itself = mock.Mock(side_effect=lambda network: mock.Mock(network=network))
    with mock.patch.object(state, "RoundedCopy", itself):
        train(config, tmp_path / "without")
    itself.assert_called_once()
    assert equal(tmp_path / "with", tmp_path / "without", 5)
    assert not equal(tmp_path / "stale", tmp_path / "without", 5)


def test_a_resumed_run_rounds_what_was_saved(shards: Path, tmp_path: Path) -> None:
    train(tiny(shards, BFLOAT16), tmp_path / "whole")
    for steps in (3, 5):
        train(tiny(shards, BFLOAT16, f"training.steps={steps}"), tmp_path / "resumed", resume=True)
    assert equal(tmp_path / "whole", tmp_path / "resumed", 5)


@pytest.mark.parametrize("overrides", [(), (BFLOAT16, "objective.kind=flow_matching")])
def test_there_is_none_where_it_would_save_nothing(overrides: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    with mock.patch.object(state, "RoundedCopy", side_effect=AssertionError):
        train(tiny(shards, *overrides, "training.steps=1"), tmp_path)
