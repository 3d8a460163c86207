"""Counted operations: by hand, by PyTorch's counter in a real forward pass, and how they grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.backbones_contract.cases import (
    DIFFUSERS,
    IMAGE,
    OWN,
    SEQUENCE,
    TINY,
    Case,
    every_backbone,
    one_of_each_family,
    params,
)

# What makes a network of the family twice as deep.
DEEPER: dict[str, dict[str, Any]] = {
    "diffusers": {"unet": DIFFUSERS | {"layers_per_block": 2}}, "unet": {"stages": 2}, "unet1d": {"stages": 2},
}  # fmt: skip
# Its recurrent layers are seen by PyTorch's counter on some devices only: they are counted by hand, below.
COUNTED_BY_HAND = ("lstm",)


@every_backbone
def test_flops_grow_with_the_network_and_the_sample(case: Case) -> None:
    net = case.build()
    flops = net.flops()
    assert isinstance(flops, int)
    assert flops > 0
    deeper = case.build(**DEEPER.get(case.family, {"depth": 4})).flops()
    assert 1.3 * flops < deeper < 2.3 * flops
    if case.is_image:
        channels, height, width = case.shape
        assert case.of((channels, 2 * height, width)).build().flops() > 1.3 * flops
    else:
        longer = (2 * case.shape[0], case.shape[1])
        assert case.of(longer).build().flops() == net.flops(longer) > 1.3 * flops


@every_backbone
def test_flops_are_the_same_wherever_the_network_is(case: Case) -> None:
    """Nothing is computed, and nothing of the network changes."""
    net = case.build()
    before, flops = {name: p.clone() for name, p in net.state_dict().items()}, net.flops()
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    net.gradient_checkpointing = True
    assert net.to("meta").flops(case.shape) == flops
    with torch.device("meta"):
        built_there = case.build()
    assert built_there.flops() == flops


@one_of_each_family
def test_flops_are_the_same_whatever_the_default_device(case: Case) -> None:
    net = case.build()
    with torch.device("meta"):
        inside = net.flops()
    assert inside == net.flops()


def counted(net: nn.Module, case: Case, batch: int) -> int:
    """By PyTorch, in a forward pass of a batch with numbers in it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(*case.inputs(batch))
    return counter.get_total_flops()


@params(case for case in OWN if case.family not in COUNTED_BY_HAND)
def test_flops_are_those_of_a_forward_pass(case: Case) -> None:
    net = case.build()
    assert counted(net, case, batch=1) == net.flops()
    assert counted(net, case, batch=3) == 3 * net.flops()


def dense(net: nn.Module, prefix: str) -> int:
    """Weights of the matrices whose name starts so."""
    found = [p.numel() for name, p in net.named_parameters() if name.startswith(prefix) and p.ndim == 2]
    assert found
    return sum(found)


@pytest.mark.parametrize("options", [{}, {"cell": "gru"}, {"causal": True}, {"cell": "gru", "causal": True}], ids=str)
@pytest.mark.parametrize("shape", [IMAGE, SEQUENCE], ids=str)
def test_flops_of_an_lstm(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Two a weight: of recurrent layers and MLPs for each token, of what embeds the condition once."""
    net = Case("lstm", shape, TINY["lstm"].options | options).build()
    tokens = 16 if len(shape) == 3 else 4
    of_tokens, of_condition = dense(net, "patch_embedding") + dense(net, "head.out"), dense(net, "head.modulation")
    for scalar in ("time", "step"):
        of_condition += dense(net, f"condition.{scalar}")
    for i in range(2):
        of_tokens += dense(net, f"blocks.{i}.mixer") + dense(net, f"blocks.{i}.mlp")
        of_condition += dense(net, f"blocks.{i}.modulation")
    assert net.flops() == 2 * (tokens * of_tokens + of_condition)


def test_flops_of_dit_b_are_those_of_its_paper() -> None:
    """23.01 G multiplications there (DiT-B/2 at 256 pixels), two operations each here; a scalar more is embedded."""
    with torch.device("meta"):
        net = Case("dit_b_2", (4, 32, 32)).build()
    assert net.flops() / 2e9 == pytest.approx(23.01, rel=0.01)
