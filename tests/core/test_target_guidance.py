"""Guidance inside targets: at the finest bootstrapped size alone, for both half steps, inherited by no other row.

The network is x_t / 2 + y, so every target has a closed form. The same comparison refuses guidance of no row, of all
rows, of one half step only, and with the conditions exchanged.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import backbones
import shortcutflow as sf
from shortcutflow.guidance import guided_velocity
from shortcutflow.objectives import Context, Draw, ShortcutObjective
from shortcutflow.path import expand_to
from shortcutflow.types import Targets
from tests.core.baseline_cases import BASELINES
from tests.core.networks import Recorder, affine

NULL = -2
SCALE = 3.0
M = 8  # three bootstrapped sizes: 1/4, 1/2, 1


def half_plus_y(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
    assert y is not None
    return 0.5 * x_t + expand_to(y, x_t)


def case(objective: sf.ShortcutObjective, generator: Generator) -> tuple[Targets, Recorder, Draw]:
    """Targets of 32 samples with labels 0, 1, 2 and the calls they took."""
    net, data = Recorder(half_plus_y), torch.randn(32, 2, generator=generator)
    draw = objective.draw(data, generator=generator)
    return objective.targets(net, data, torch.arange(32) % 3, draw, Context(null_y=NULL)), net, draw


def expected(targets: Targets, guided: Tensor, scale: float, scale_of_second: float | None = None) -> Tensor:
    """Bootstrap targets in closed form: two half steps of x / 2 + g, g being the guided or the plain condition."""
    n = targets.n_bootstrap
    assert targets.y is not None
    x, half, y = targets.x_t[:n], targets.d[:n, None] / 2, targets.y[:n, None].float()
    first, second = (
        torch.where(guided[:, None], NULL + s * (y - NULL), y)
        for s in (scale, scale if scale_of_second is None else scale_of_second)
    )
    v1 = 0.5 * x + first
    v2 = 0.5 * (x + half * v1) + second
    return (v1 + v2) / 2


def agree(targets: Targets, other: Tensor) -> bool:
    return torch.allclose(targets.v[: targets.n_bootstrap], other, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, SCALE])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_finest_size_alone_is_guided(scale: float, dropout: float, generator: Generator) -> None:
    objective = sf.ShortcutObjective(
        finest_steps=M, bootstrap_fraction=0.5, guidance_scale=scale, condition_dropout=dropout
    )
    targets, _, _ = case(objective, generator)
    finest = targets.d[: targets.n_bootstrap] == 2 / M
    assert 5 <= finest.sum() <= 6, "a third of 16 rows"
    assert agree(targets, expected(targets, finest, scale))


def test_other_guidance_is_told_apart(generator: Generator) -> None:
    objective = sf.ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, guidance_scale=SCALE)
    targets, _, _ = case(objective, generator)
    finest = targets.d[: targets.n_bootstrap] == 2 / M
    assert not agree(targets, expected(targets, torch.zeros_like(finest), SCALE)), "none"
    assert not agree(targets, expected(targets, torch.ones_like(finest), SCALE)), "all sizes"
    assert not agree(targets, expected(targets, ~finest, SCALE)), "the coarser sizes"
    assert not agree(targets, expected(targets, finest, SCALE, scale_of_second=1)), "the first half step only"
    assert not agree(targets, expected(targets, finest, 1 - SCALE)), "the conditions exchanged"


def test_flow_rows_are_not_guided(generator: Generator) -> None:
    objective = sf.ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, guidance_scale=SCALE)
    targets, _, draw = case(objective, generator)
    n = targets.n_bootstrap
    data_end = targets.x_t[n:] + (1 - targets.t[n:, None]) * targets.v[n:]
    noise_end = targets.x_t[n:] - targets.t[n:, None] * targets.v[n:]
    torch.testing.assert_close(noise_end, draw.noise[n:])
    assert not torch.allclose(data_end, draw.noise[n:])


def test_guidance_costs_a_bounded_number_of_rows_in_the_same_two_calls(generator: Generator) -> None:
    """16 bootstrap rows over three sizes: at most 6 may be guided, whatever the draw."""
    objective = sf.ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, guidance_scale=SCALE)
    for _ in range(20):
        _, net, draw = case(objective, generator)
        assert [len(call.x_t) for call in net.calls] == [16 + 6, 16 + 6]
        assert not draw.guided[6:].any()
        for call in net.calls:
            assert call.y is not None
            assert (call.y[16:] == NULL).all()
            assert torch.equal(call.x_t[16:], call.x_t[:6])
    _, net, _ = case(sf.ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5), generator)
    assert [len(call.x_t) for call in net.calls] == [16, 16]


@pytest.mark.parametrize("rows", range(1, 60, 7))
def test_guided_rows_lie_within_their_bound(rows: int, generator: Generator) -> None:
    objective = sf.ShortcutObjective(bootstrap_fraction=1, guidance_scale=SCALE)
    for _ in range(100):
        draw = objective.draw(torch.zeros(rows, 1), generator=generator)
        assert torch.equal(draw.guided, draw.d == 2 / 128)
        assert draw.guided.sum() <= draw.max_guided <= rows
        assert not draw.guided[draw.max_guided :].any()


def test_guidance_of_some_rows_is_guidance_where_the_mask_says_so(generator: Generator) -> None:
    x_t, t, d = torch.randn(6, 3, generator=generator), torch.linspace(0, 0.9, 6), torch.full((6,), 0.1)
    y = torch.arange(6)
    guided = torch.tensor([True, False, True, False, False, False])
    mixed = guided_velocity(affine, x_t, t, d, y, mask=guided, max_guided=4, scale=SCALE, null_y=NULL)
    full = guided_velocity(affine, x_t, t, d, y, scale=SCALE, null_y=NULL)
    plain = affine(x_t, t, d, y)
    torch.testing.assert_close(mixed, torch.where(guided[:, None], full, plain))
    assert not torch.allclose(mixed, full)
    assert not torch.allclose(mixed, plain)


@pytest.mark.parametrize(
    ("y", "null_y", "message"),
    [(None, NULL, "guidance_scale 3 needs a condition y"), (torch.zeros(32).long(), None, "need null_y")],
    ids=["no condition", "no null condition"],
)
def test_guidance_needs_both_conditions(y: Tensor | None, null_y: Any, message: str, generator: Generator) -> None:
    objective = sf.ShortcutObjective(guidance_scale=SCALE)
    with pytest.raises(ValueError, match=message):
        objective(affine, torch.randn(32, 2, generator=generator), y, null_y=null_y, generator=generator)


@pytest.mark.parametrize("flow_of", ["data", "teacher"])
def test_guidance_and_means_keep_the_digits_of_a_bfloat16_network(flow_of: str) -> None:
    """Two close velocities in bfloat16, their difference times 8: computed in bfloat16 that rounds again each time."""

    def close(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        assert y is not None
        return (1.5 + x.float() / 8 + (y / 64).view(-1, 1)).bfloat16()

    data, y = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    objective = ShortcutObjective(finest_steps=4, bootstrap_fraction=0.5, guidance_scale=8.0, flow_of=flow_of)
    draw = objective.draw(data, generator=torch.Generator().manual_seed(1))
    rows = objective.targets(close, data, y, draw, Context(teacher=close, null_y=3))

    def reference(precise: bool) -> Tensor:
        """Eq. 4 on the guided rows, from the same bfloat16 velocities."""
        x, t, half = rows.x_t[:32], rows.t[:32], rows.d[:32] / 2
        cast = (lambda v: v.float()) if precise else (lambda v: v)
        total = []
        for _ in range(2):
            with_y, null = (cast(close(x, t, half, c)) for c in (y[:32], torch.full((32,), 3)))
            v = null + 8.0 * (with_y - null)
            total.append(torch.where(draw.guided.view(-1, 1), v, with_y))
            x = x + half.view(-1, 1) * total[0]
        return ((total[0] + total[1]) / 2).float()

    torch.testing.assert_close(rows.v[:32], reference(precise=True), rtol=1e-6, atol=1e-6)
    assert (rows.v[:32] - reference(precise=False)).abs().max() > 3e-3, "the negative control: all in bfloat16"
    guided = guided_velocity(close, data, draw.t, draw.d, y, scale=8.0, null_y=3)
    assert guided.dtype == torch.float32
    null = torch.full_like(y, 3)
    parts = [close(data, draw.t, draw.d, c).float() for c in (y, null)]
    torch.testing.assert_close(guided, parts[1] + 8 * (parts[0] - parts[1]), rtol=1e-6, atol=1e-6)


def test_a_network_in_bfloat16_trains_on_bfloat16_data() -> None:
    """Velocities are combined in float32, but states reach the network in the type of the data."""
    net = torch.nn.Linear(5, 5).bfloat16()

    def call(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        return net(x)

    data = torch.randn(32, 5).bfloat16()
    for objective in (ShortcutObjective(finest_steps=4, bootstrap_fraction=0.5), *BASELINES.values()):
        plain = objective.model_copy(update={"condition_dropout": 0.0})
        y = torch.zeros(32, dtype=torch.int64)
        generator = torch.Generator().manual_seed(0)
        report = plain(call, data[:24], y[:24], teacher=call, progress=0.3, null_y=1, generator=generator)
        assert report.loss.isfinite()


def test_a_transformer_under_autocast_is_guided_in_float32() -> None:
    """Its velocities come in bfloat16; what is made of them has more digits, in targets and in samples."""
    torch.manual_seed(0)
    net = backbones.create("dit", shape=(2, 4, 4), num_classes=3, width=32, depth=1, heads=2, finest_steps=M)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    given: list[Tensor] = []
    net.register_forward_hook(lambda _module, _inputs, out: given.append(out.detach()))
    data, y = torch.randn(24, 2, 4, 4), torch.arange(24) % 3
    objective = ShortcutObjective(finest_steps=M, bootstrap_fraction=1, guidance_scale=SCALE)
    draw = objective.draw(data, generator=Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        targets = objective.targets(net, data, y, draw, Context(null_y=3))
        halves = list(given)
        report = objective(net, data, y, null_y=3, generator=Generator().manual_seed(0))
        sampled = sf.sample(net, data, y, guidance_scale=SCALE, null_y=3)
    assert {out.dtype for out in given} == {torch.bfloat16}
    assert [len(out) for out in halves] == [24 + draw.max_guided] * 2

    def guided(out: Tensor) -> Tensor:
        plain, null = out[:24], out[24:]
        head = null + SCALE * (plain[: len(null)] - null)
        mask = draw.guided[: len(null)].view(-1, 1, 1, 1)
        return torch.cat([torch.where(mask, head, plain[: len(null)]), plain[len(null) :]])

    precise, rounded = (sum(guided(out.to(dtype)) for out in halves) / 2 for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(targets.v, precise)
    assert not torch.allclose(targets.v, rounded.float()), "the negative control: all in bfloat16"
    assert report.loss.dtype == sampled.dtype == targets.v.dtype == torch.float32
    assert not torch.equal(sampled - data, (sampled - data).bfloat16().float())
    report.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
