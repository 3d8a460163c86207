"""The DiT's own options: sizes that do not divide, presets, and what the released conventions and baselines change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import backbones
from tests.backbones_contract.cases import IMAGE, TINY, Case

TINY_DIT = TINY["dit"].options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 32, "heads": 3}, "heads must divide width: width 32, heads 3"),
        ({"width": 30, "heads": 2}, "width must be a multiple of 4 for 2-D positions, got 30"),
        ({"patch": 3}, r"patch must divide the sizes \(8, 8\), got 3"),
        ({"patch": 0}, r"patch must divide .* got 0"),
        ({"shape": (3, 8, 6), "patch": 4}, r"patch must divide the sizes \(8, 6\)"),
        ({"shape": (9, 4)}, r"patch must divide the sizes \(9,\)"),
        ({"shape": (8,)}, r"\(channels, height, width\) or \(length, channels\), got \(8,\)"),
        ({"shape": (1, 3, 8, 8)}, r"got \(1, 3, 8, 8\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.create("dit", **({"shape": IMAGE} | TINY_DIT | options))


def parameters_of(name: str, **options: Any) -> int:
    with torch.device("meta"):  # counted, never filled
        net = backbones.create(name, shape=(4, 32, 32), num_classes=1000, **options)
    return sum(p.numel() for p in net.parameters())


def test_presets_have_their_published_sizes() -> None:
    assert parameters_of("dit_b_2", released=True) == 131_091_728
    # 256 log-variances that nothing reads are the released code's own.
    assert parameters_of("dit_b_2") == 131_091_728 - 256
    assert parameters_of("dit_b_2", released=True, ignore_step_size=True) == 131_091_728
    assert parameters_of("dit_b_4", released=True) != 131_091_728


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 131), ("l", 458), ("xl", 676)])
def test_presets_are_near_the_sizes_of_the_dit_paper(size: str, millions: int) -> None:
    """33, 130, 458 and 675 million there; a second embedding of a scalar comes on top here, a doubled output there."""
    assert parameters_of(f"dit_{size}_2") / 1e6 == pytest.approx(millions, rel=0.02)
    assert parameters_of(f"dit_{size}_2", depth=1) / 1e6 < 0.5 * millions


def test_every_preset_can_be_built() -> None:
    sizes = ("s", "b", "l", "xl")
    presets = [f"dit_{size}_{patch}" for size in sizes for patch in (2, 4, 8)]
    without_patch = [f"dit_{size}" for size in sizes]
    assert [name for name in backbones.names() if name.startswith("dit_")] == sorted(presets + without_patch)
    for name in presets:
        with torch.device("meta"):
            net: Any = backbones.create(name, shape=(4, 32, 32))
        patch = int(name.split("_")[-1])
        assert net.head.out.out_features == 4 * patch**2
        assert len(net.positions) == (32 // patch) ** 2


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
