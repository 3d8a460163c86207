"""Sizes of samples: odd ones, sequences of another length at each call, and those that a network refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.backbones_contract.cases import TINY, Case, cases, every_case, every_odd_size, every_sequence

Net = Callable[..., Tensor]


def untouched_corners(net: Net, case: Case) -> list[tuple[int, ...]]:
    """Corners of a sample where the output stays the same when x_t changes there."""
    x_t, t, d, y = case.inputs(batch=1)
    before = net(x_t, t, d, y)
    assert before.shape == x_t.shape
    assert before.isfinite().all()
    corners = torch.cartesian_prod(*(torch.tensor([0, n - 1]) for n in case.shape)).tolist()
    found = []
    for corner in map(tuple, corners):
        changed = x_t.clone()
        changed[(0, *corner)] += 3
        if torch.allclose(net(changed, t, d, y)[(0, *corner)], before[(0, *corner)], atol=1e-4):
            found.append(corner)
    return found


@every_odd_size
@torch.no_grad()
def test_odd_sizes(case: Case) -> None:
    """Sizes that halve to a fraction: nothing of the last row and column is lost on the way."""
    net = case.awake()
    assert untouched_corners(net, case) == []

    def cropping(x_t: Tensor, *rest: Any) -> Tensor:
        whole = torch.cat([x_t[..., :-1], torch.zeros_like(x_t[..., :1])], dim=-1)
        return torch.cat([net(whole, *rest)[..., :-1], torch.zeros_like(x_t[..., :1])], dim=-1)

    assert {corner[-1] for corner in untouched_corners(cropping, case)} == {case.shape[-1] - 1}


LENGTHS = 2, 4, 6, 8, 12


def lengths_that_differ(net: Net, case: Case, state: dict[str, Tensor]) -> list[int]:
    """Lengths whose output is not that of a network built for them, with the same state dict."""
    found = []
    for n in LENGTHS:
        of_length = case.of((n, *case.shape[1:]))
        built, inputs = of_length.awake(seed=1), of_length.inputs()
        built.load_state_dict(state)
        expected, out = built(*inputs), net(*inputs)
        assert out.shape == inputs[0].shape
        if not torch.allclose(out, expected, atol=1e-5 * float(expected.std())):
            found.append(n)
    return found


@every_sequence
@torch.no_grad()
def test_sequences_of_any_length(case: Case) -> None:
    """Shorter and longer than the network was built for; another package's network may refuse them."""
    net = case.awake()
    try:
        net(*case.of((LENGTHS[0], *case.shape[1:])).inputs())
    except ValueError:
        if case.family not in TINY:
            pytest.skip("takes one length")
        raise
    assert lengths_that_differ(net, case, net.state_dict()) == []
    longest = LENGTHS[-1]

    def padding(x_t: Tensor, *rest: Tensor) -> Tensor:
        n = x_t.shape[1]
        return net(F.pad(x_t, (0, 0, longest - n, 0)), *rest)[:, longest - n :]

    assert lengths_that_differ(padding, case, net.state_dict()) == [n for n in LENGTHS if n < longest]


@pytest.mark.parametrize("case", [case for case in every_sequence.args[1] if case.values[0].options.get("patch") == 2])
def test_a_length_that_the_patch_does_not_divide(case: Case) -> None:
    net = case.build()
    x_t, t, d, y = case.of((7, *case.shape[1:])).inputs()
    with pytest.raises(ValueError, match=r"patch must divide the sizes \(7,\), got 2"):
        net(x_t, t, d, y)
    assert case.of((7, *case.shape[1:])).accepts(patch=1)


@every_case
def test_x_t_of_another_shape_is_refused(case: Case) -> None:
    """An image of another size, other channels, an axis too few or too many."""
    net, (x_t, *rest) = case.build(), case.inputs()
    net(x_t, *rest)
    wrong = [torch.cat([x_t, x_t], dim=-1), x_t[..., :-2], x_t.flatten(1), x_t[0], x_t[None]]
    if case.is_image:
        wrong += [torch.cat([x_t, x_t], dim=1), torch.cat([x_t, x_t], dim=2), x_t[:, :, :-2], x_t[:, :1]]
    for x in wrong:
        with pytest.raises(ValueError, match=r"x_t must be|x_t must have shape \(batch, ") as raised:
            net(x, *rest)
        assert str(tuple(x.shape)) in str(raised.value)


def test_channels_last_gives_the_same() -> None:
    case = next(case for case in cases() if case.family == "unet" and case.is_image)
    net, (x_t, *rest) = case.awake(), case.inputs()
    usual = net(x_t, *rest)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x_t.to(memory_format=torch.channels_last), *rest), usual, atol=1e-4, rtol=1e-4)
