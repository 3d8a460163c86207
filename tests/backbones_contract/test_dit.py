"""The DiT's own options: what the released conventions and baselines change, and where patches go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backbones_contract.cases import IMAGE, TINY, Case

TINY_DIT = TINY["dit"].options


@torch.no_grad()
def test_a_baseline_can_ignore_the_step_size() -> None:
    case = Case("dit", IMAGE, TINY_DIT)
    ignorant, aware = case.awake(ignore_step_size=True), case.awake()
    x_t, t, _, y = case.inputs()
    sizes = [torch.full_like(t, d) for d in (0.0, 1 / 128, 0.5)]
    whole = aware(x_t, t, torch.ones_like(t), y)
    assert all(torch.equal(ignorant(x_t, t, d, y), whole) for d in sizes)
    assert not any(torch.allclose(aware(x_t, t, d, y), whole) for d in sizes)


@pytest.mark.parametrize("released", [False, True])
def test_it_starts_as_the_zero_network(released: bool) -> None:
    case = Case("dit", IMAGE, TINY_DIT | {"released": released})
    assert not case.build()(*case.inputs()).any()
    assert case.awake()(*case.inputs()).std() > 0.01
    net: Any = case.build()
    started_at_zero = [not block.modulation.weight.any() for block in net.blocks]
    assert started_at_zero == [not released] * 2


@torch.no_grad()
def test_released_conventions_change_the_answer() -> None:
    """Attention by 1/head size, and t not multiplied by 1000: undone one after the other, nothing is left of them."""
    ours, theirs = (Case("dit", IMAGE, TINY_DIT | {"released": released}) for released in (False, True))
    net: Any = ours.awake()
    released: Any = theirs.awake()
    loaded = released.load_state_dict(net.state_dict(), strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["log_variances"], [])
    assert not released.log_variances.requires_grad
    x_t, t, d, y = ours.inputs()
    zero = torch.zeros_like(t)  # embedded alike by both
    assert not torch.allclose(net(x_t, zero, d, y), released(x_t, zero, d, y))
    for block in released.blocks:
        assert block.mixer.scale == 2 / 32
        block.mixer.scale = (2 / 32) ** 0.5
    torch.testing.assert_close(net(x_t, zero, d, y), released(x_t, zero, d, y))
    assert not torch.allclose(net(x_t, t, d, y), released(x_t, t, d, y))
    released.condition.time.frequencies.mul_(1000)
    torch.testing.assert_close(net(x_t, t, d, y), released(x_t, t, d, y), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_patches_are_seen_by_their_place() -> None:
    """Two exchanged patches give more than exchanged outputs, as positions are embedded."""
    case = Case("dit", (8, 4), TINY_DIT)
    net: Any = case.awake()
    x_t, t, d, y = case.inputs()

    def asymmetry(net: Any) -> float:
        return float((net(x_t.roll(2, 1), t, d, y).roll(-2, 1) - net(x_t, t, d, y)).abs().max())

    assert asymmetry(net) > 1e-2
    net.positions.zero_()
    assert asymmetry(net) < 1e-4


def misplaced(net: Any, case: Case) -> list[int]:
    """Entries of a sample that, changed, change the output outside of their own patch; attention being silenced."""
    for block in net.blocks:
        block.mixer.out.weight.zero_()
    x_t, t, d, y = case.inputs(batch=1)
    n = x_t.numel()
    each_changed = x_t + torch.eye(n).view(n, *case.shape)
    after = net(each_changed, t.expand(n), d.expand(n), y.expand(n))
    changed = ((after - net(x_t, t, d, y)).abs() > 1e-4).view(n, n)
    assert changed.any(1).all()
    # Two entries share a patch of side 2 if their places agree when halved, whichever their channels.
    channel_axis = 0 if len(case.shape) == 3 else 1
    place = torch.stack(torch.meshgrid(*map(torch.arange, case.shape), indexing="ij"), dim=-1).view(n, -1) // 2
    place[:, channel_axis] = 0
    return [i for i in range(n) if (changed[i] & (place != place[i]).any(1)).any()]


@pytest.mark.parametrize("shape", [(3, 4, 8), (8, 4)], ids=str)
@torch.no_grad()
def test_patches_return_to_their_place(shape: tuple[int, ...]) -> None:
    case = Case("dit", shape, TINY_DIT)
    assert misplaced(case.awake(), case) == []
    moved: Any = case.awake()
    moved.head.register_forward_hook(lambda _module, _args, out: out.roll(1, dims=1))
    assert misplaced(moved, case) == list(range(torch.Size(shape).numel()))
