"""The later methods of the shortcut family: their solutions, what they have in common, and their derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import backbones
import shortcutflow as sf
from shortcutflow.objectives import (
    AlphaFlowObjective,
    Context,
    Draw,
    LagrangianObjective,
    MeanFlowObjective,
    SoFlowObjective,
    SplitMeanFlowObjective,
)
from shortcutflow.objectives.objective import Step
from shortcutflow.path import expand_to, interpolate
from shortcutflow.types import Network
from tests.core.gaussian import Gaussian, order_of
from tests.core.networks import Learner

GAUSSIAN = Gaussian.example(2, 2, 2)
EXACT = GAUSSIAN.net()
METHODS: dict[str, Any] = {
    "split mean flow": SplitMeanFlowObjective(bootstrap_fraction=1),
    "in the middle": SplitMeanFlowObjective(bootstrap_fraction=1, split="middle"),
    "alpha-flow": AlphaFlowObjective(bootstrap_fraction=1, alpha=0.005),
    "soflow": SoFlowObjective(bootstrap_fraction=1),
    "mean flow": MeanFlowObjective(bootstrap_fraction=1),
    "mean flow, exact": MeanFlowObjective(bootstrap_fraction=1, derivative="jvp"),
    "lagrangian": LagrangianObjective(bootstrap_fraction=1),
    "lagrangian, exact": LagrangianObjective(bootstrap_fraction=1, derivative="jvp"),
}
TOLERANCE = {"alpha-flow": 2e-2, "soflow": 1e-2, "mean flow": 1e-3, "lagrangian": 5e-3}
"""A first leg on a straight line errs by its length, a difference at the ends of the interval by its distance."""
every_method = pytest.mark.parametrize("name", METHODS)


def gaussian_rows(objective: Any) -> tuple[Tensor, Draw]:
    """Data and a draw whose straight lines have the flow's velocity, which is the mean of x_1 - x_0 at x_t."""
    data = GAUSSIAN.draw(256, Generator().manual_seed(0))
    draw = objective.draw(data, Generator().manual_seed(1), Context(progress=1.0))
    draw = replace(
        draw, t=draw.t.double(), d=draw.d.double(), split=None if draw.split is None else draw.split.double()
    )
    x_t = interpolate(draw.noise, data, draw.t)
    v = GAUSSIAN.velocity(x_t, draw.t)
    noise = x_t - expand_to(draw.t, x_t) * v
    return noise + v, replace(draw, noise=noise)


def residual(objective: Any, net: Network) -> float:
    """How far targets are from the network's own answers, at most."""
    data, draw = gaussian_rows(objective)
    rows = objective.targets(net, data, None, draw)
    return float((net(rows.x_t, rows.t, rows.d, None) - rows.v).abs().max())


def larger(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
    """The exact network but for the larger steps."""
    return EXACT(x_t, t, d, y) + 0.2 * expand_to(d, x_t)


def instantaneous(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
    """The flow's velocity for steps of any size."""
    return GAUSSIAN.velocity(x_t, t)


@every_method
def test_the_exact_flow_map_is_its_own_target_and_no_other_is(name: str) -> None:
    tolerance = TOLERANCE.get(name, 1e-6)
    assert residual(METHODS[name], EXACT) < tolerance
    share = 0.002 if name == "soflow" else 0.005 if name == "alpha-flow" else 1
    for wrong in (larger, instantaneous):
        # A first leg of a small share moves the target by that share of the difference only.
        assert residual(METHODS[name], wrong) > 0.03 * share
        if share == 1:
            assert residual(METHODS[name], wrong) > 10 * tolerance


@pytest.mark.parametrize("wrong", [larger, instantaneous])
def test_a_short_leg_of_data_tells_the_exact_map_from_others_to_first_order(wrong: Network) -> None:
    """Divided by its share, what a leg changes has a limit, which is zero for the exact map alone."""

    def scaled(net: Network, share: float) -> float:
        return residual(AlphaFlowObjective(bootstrap_fraction=1, alpha=share), net) / share

    shares = [0.04, 0.02, 0.01]
    assert order_of(shares, [scaled(EXACT, share) for share in shares]) == pytest.approx(1, abs=0.2)
    assert abs(order_of(shares, [scaled(wrong, share) for share in shares])) < 0.2


# ---- what the methods have in common


def step_of(net: Network) -> Step:
    return lambda x, t, d: net(x, t, d, None)


def dyadic() -> tuple[Tensor, Draw]:
    """A shortcut model's own draw."""
    data = torch.randn(64, 3, generator=Generator().manual_seed(0))
    return data, sf.ShortcutObjective(bootstrap_fraction=1).draw(data, Generator().manual_seed(1))


def test_split_in_the_middle_is_a_shortcut_model_in_continuous_time() -> None:
    net = Learner()
    data, draw = dyadic()
    shortcut = sf.ShortcutObjective(bootstrap_fraction=1).targets(net, data, None, draw)
    halves = replace(draw, split=torch.full_like(draw.d, 0.5))
    for split in (draw, halves):
        assert torch.equal(SplitMeanFlowObjective().targets(net, data, None, split).v, shortcut.v)
    uneven = replace(draw, split=torch.full_like(draw.d, 0.4))
    assert not torch.allclose(SplitMeanFlowObjective().targets(net, data, None, uneven).v, shortcut.v)


def test_alpha_flow_at_a_half_with_a_leg_of_the_network_is_a_shortcut_model() -> None:
    net = Learner()
    data, draw = dyadic()
    shortcut = sf.ShortcutObjective(bootstrap_fraction=1).targets(net, data, None, draw)
    s, x_t = step_of(net), shortcut.x_t
    own = s(x_t, draw.t, draw.d / 2)
    *_, target = AlphaFlowObjective().bootstrap(s, x_t, draw.t, draw.d, own, 0.5)
    assert torch.equal(target, shortcut.v)
    *_, of_data = AlphaFlowObjective().bootstrap(s, x_t, draw.t, draw.d, data - draw.noise, 0.5)
    assert not torch.allclose(of_data, shortcut.v)


def test_alpha_flow_at_one_is_flow_matching_on_steps_of_any_size() -> None:
    data, draw = dyadic()
    draw = replace(draw, split=torch.ones_like(draw.d))
    assert torch.equal(AlphaFlowObjective().targets(Learner(), data, None, draw).v, data - draw.noise)


def test_a_short_leg_of_data_tends_to_mean_flow_and_a_short_second_leg_to_the_lagrangian() -> None:
    """(target - prediction)/lam of alpha-Flow is that of MeanFlow; with 1 - lam, of SplitMeanFlow, the Lagrangian."""
    net = larger
    for limit, method, share_of in (
        (MeanFlowObjective(derivative="jvp"), AlphaFlowObjective(), lambda e: e),
        (LagrangianObjective(derivative="jvp"), SplitMeanFlowObjective(), lambda e: 1 - e),
    ):
        data, draw = gaussian_rows(METHODS["mean flow"])
        rows = limit.targets(net, data, None, draw)
        prediction = net(rows.x_t, rows.t, rows.d, None)
        expected = rows.v - prediction
        errors = []
        for e in (0.02, 0.01, 0.005):
            split = replace(draw, split=torch.full_like(draw.d, share_of(e)))
            moved = (method.targets(net, data, None, split).v - prediction) / e
            errors.append(float((moved - expected).abs().mean() / expected.abs().mean()))
        assert order_of([0.02, 0.01, 0.005], errors) == pytest.approx(1, abs=0.2), method.kind
        assert errors[-1] < 0.03


# ---- derivatives


@pytest.mark.parametrize("kind", [MeanFlowObjective, LagrangianObjective])
def test_differences_are_the_exact_derivative_to_second_order(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, draw = gaussian_rows(METHODS["mean flow"])
    # Away from the ends of the interval, where differences are of one side.
    inside = (draw.t > 0.05) & (draw.d > 0.05) & (draw.t + draw.d < 0.95)
    exact = kind(derivative="jvp").targets(larger, data, None, draw).v
    errors, distances = [], [0.02, 0.01, 0.005]
    for distance in distances:
        monkeypatch.setattr("shortcutflow.objectives.two_leg.DIFFERENCE", distance)
        by_difference = kind().targets(larger, data, None, draw).v
        errors.append(float((by_difference - exact)[inside].abs().max()))
        assert float((by_difference - exact).abs().max()) < 10 * distance
    assert order_of(distances, errors) == pytest.approx(2, abs=0.2)
    assert errors[-1] < 1e-3
    wrong = kind().bootstrap(step_of(larger), *[draw.noise, draw.t, draw.d, data], 0.5)[-1]
    assert float((wrong - exact)[inside].abs().max()) > 1e-2


@pytest.mark.parametrize("kind", [MeanFlowObjective, LagrangianObjective])
def test_times_and_sizes_stay_in_the_unit_interval(kind: Any) -> None:
    """At every corner of t >= 0, d >= 0, t + d <= 1."""
    asked: list[Tensor] = []

    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        asked.extend((t, d, t + d))
        return x_t

    t, d = torch.tensor([0, 0, 1, 0.4, 0, 0.7]), torch.tensor([0, 1, 0, 0.6, 0.001, 0.001])
    data = torch.randn(6, 3)
    draw = Draw(torch.randn(6, 3), t, d, torch.zeros(6).bool(), 6)
    assert kind().targets(net, data, None, draw).v.isfinite().all()
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in asked)


@pytest.mark.parametrize("kind", [MeanFlowObjective, LagrangianObjective])
def test_both_derivatives_of_a_transformer(kind: Any) -> None:
    """With its attention, and step sizes that the network knows (below 1/M all are one)."""
    torch.manual_seed(0)
    net = backbones.create("dit", shape=(1, 4, 4), width=32, depth=1, heads=2, patch=2, time_scale=10.0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    data = torch.randn(16, 1, 4, 4)
    draw = kind(bootstrap_fraction=1).draw(data, Generator().manual_seed(0))
    draw = replace(draw, t=draw.t * 0.4 + 0.05, d=draw.d * 0.4 + 0.1)
    exact = kind(derivative="jvp").targets(net, data, None, draw).v
    by_difference = kind().targets(net, data, None, draw).v
    torch.testing.assert_close(by_difference, exact, rtol=0.02, atol=0.02)
    assert not torch.allclose(exact, data - draw.noise, atol=0.1)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def test_a_network_without_forward_mode_is_refused_in_a_sentence() -> None:
    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        return NoForwardMode.apply(x_t)

    data = torch.randn(8, 3)
    with pytest.raises(RuntimeError, match=r"derivative='jvp' does not go through .* use derivative='difference'"):
        MeanFlowObjective(derivative="jvp")(net, data)
    assert MeanFlowObjective()(net, data).loss.isfinite()


def test_a_replicated_network_takes_differences_or_another_network_for_targets() -> None:
    """DistributedDataParallel copies buffers, which a derivative cannot go through."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        net = backbones.create("dit", shape=(1, 4, 4), width=32, depth=1, heads=2, patch=2)
        replicated = nn.parallel.DistributedDataParallel(net)
        data, exact = torch.randn(8, 1, 4, 4), MeanFlowObjective(derivative="jvp")
        with pytest.raises(RuntimeError, match=r"use derivative='difference', or a target_net that is not wrapped"):
            exact(replicated, data)
        assert MeanFlowObjective()(replicated, data).loss.isfinite()
        losses = [
            exact(each, data, target_net=net, generator=Generator().manual_seed(0)).loss for each in (replicated, net)
        ]
        torch.testing.assert_close(*losses)
    finally:
        torch.distributed.destroy_process_group()


# ---- schedules and weights


def test_schedules() -> None:
    alpha, soflow = AlphaFlowObjective(), SoFlowObjective()
    assert [alpha.share_at(p) for p in (0, 0.5, 1)] == [1, 0.5, 0.005]
    assert [soflow.share_at(p) for p in (0, 1)] == [0.1, 0.002]
    for objective in (alpha, soflow):
        shares = [objective.share_at(i / 100) for i in range(101)]
        assert shares == sorted(shares, reverse=True)
        with pytest.raises(ValueError, match="pass progress"):
            objective.draw(torch.zeros(8, 2))


def test_rows_keep_their_gradient_while_the_first_leg_shrinks() -> None:
    """error/lam with the error itself proportional to lam^2, whatever the power."""

    def gradient(objective: Any) -> Tensor:
        net = Learner()
        data = torch.randn(512, 3, generator=Generator().manual_seed(0))
        report = objective(net, data, generator=Generator().manual_seed(1))
        return torch.autograd.grad(report.loss, net.weight)[0]

    for power in (0, 0.5, 1):
        first, second, third = (
            gradient(AlphaFlowObjective(bootstrap_fraction=1, alpha=alpha, adaptive_power=power))
            for alpha in (0.02, 0.01, 0.005)
        )
        assert (second - first).norm() < 0.05 * first.norm()
        assert (third - second).norm() < (second - first).norm()


def test_adaptive_weight_is_of_the_error_without_gradient() -> None:
    data = torch.randn(64, 3, generator=Generator().manual_seed(0))

    def run(power: float) -> tuple[sf.LossReport, Tensor]:
        net = Learner()
        report = sf.FlowMatchingObjective(adaptive_power=power)(net, data, generator=Generator().manual_seed(1))
        return report, torch.autograd.grad(report.loss, net.weight)[0]

    plain, _ = run(0)
    assert plain.loss == plain.row_loss.mean()
    for power in (0.5, 1.0):
        report, gradient = run(power)
        assert torch.equal(report.row_loss, plain.row_loss), "reported without their weight"
        torch.testing.assert_close(report.loss.detach(), (plain.row_loss * (plain.row_loss + 0.01) ** -power).mean())
        net = Learner()
        rows = report.targets
        error = (net(rows.x_t, rows.t, rows.d, None) - rows.v).square().mean(1)
        smooth = (error + 0.01).log() if power == 1 else 2 * (error + 0.01).sqrt()
        by_hand = torch.autograd.grad(smooth.mean(), net.weight)[0]
        torch.testing.assert_close(gradient, by_hand)


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "negative control"])
def test_one_step_after_training(name: str) -> None:
    """Flow matching, the negative control, gives the mean of the data in one step: about 0.9 off the exact end."""
    few = Gaussian.example(3)
    # With the defaults of each but its derivative.
    derivative = {"derivative": "jvp"} if name.endswith("exact") else {}
    objective = type(METHODS[name])(**derivative) if name in METHODS else sf.FlowMatchingObjective()
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 3))

    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        return body(torch.cat([x_t, t[:, None], d[:, None]], dim=1))

    generator = Generator().manual_seed(0)
    optimizer = torch.optim.Adam(body.parameters(), lr=2e-3)
    for step in range(600):
        objective(net, few.draw(256, generator).float(), generator=generator, progress=step / 600).loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
        optimizer.step()
        optimizer.zero_grad()
    noise = torch.randn(2000, 3, generator=generator)
    exact = few.flow_map(noise.double(), torch.zeros(2000), torch.ones(2000))
    error = float((sf.sample(net, noise, steps=1) - exact).square().mean().sqrt())
    assert error < 0.45 if name in METHODS else error > 0.6, error
