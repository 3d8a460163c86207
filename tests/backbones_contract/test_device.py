"""A GPU makes of every network what the CPU makes of it; for ``pytest --device cuda``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shortcutflow.train.step import arithmetic
from tests.backbones_contract.cases import Case, every_case
from tests.backbones_contract.compared import assert_equal_training, trained


@pytest.fixture(autouse=True)
def on_a_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("every other test of this folder runs on the CPU; this one compares a GPU with it: --device cuda")


@every_case
def test_output_and_gradients_are_those_of_the_cpu(case: Case, device: torch.device) -> None:
    net = case.awake()
    expected = trained(net, case)
    net.to(device)
    with arithmetic(tf32=False, deterministic=False):
        out, gradients = trained(net, case, lambda *inputs: net(*(each.to(device) for each in inputs)))
    here = out.cpu(), {name: g.cpu() for name, g in gradients.items()}
    assert_equal_training(here, expected, case, tolerance=1e-3)


@every_case
@torch.no_grad()
def test_autocast_keeps_time_and_step_size_in_float32(case: Case, device: torch.device) -> None:
    """1 - 2^-10 and 1 are one number in bfloat16."""
    net = case.awake().to(device)
    x_t, t, d, y = (each.to(device) for each in case.inputs())

    def at(t: Tensor, d: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return net(x_t, t, d, y)

    ones = torch.ones_like(t)
    assert not torch.equal(at(ones - 2**-10, d), at(ones, d))
    assert not torch.equal(at(t, ones - 2**-10), at(t, ones))
    assert torch.equal(at((ones - 2**-10).bfloat16().float(), d), at(ones, d))
