"""Weights of rows, auxiliary outputs and densities of times: each against a closed form, and unused without a trace."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import shortcutflow as sf
from shortcutflow.schedule import LogitNormal, draw_times
from tests.core.networks import Learner, affine


def seeded() -> Generator:
    return Generator().manual_seed(0)


class TwiceTheBootstrapRows(sf.ShortcutObjective):
    """A fixed weight."""

    def targets(self, *args: Any, **options: Any) -> sf.Targets:
        rows = super().targets(*args, **options)
        weight = torch.ones_like(rows.t)
        weight[: rows.n_bootstrap] = 2
        return replace(rows, weight=weight)


class Adaptive(sf.ShortcutObjective):
    """A weight that depends on the error."""

    def weigh(self, error: Tensor, targets: sf.Targets, aux: Any) -> Tensor:
        return error / (error.detach() + 0.01)


class Learned(sf.FlowMatchingObjective):
    """A weight that comes from the network."""

    def weigh(self, error: Tensor, targets: sf.Targets, aux: Any) -> Tensor:
        return error / aux.exp() + aux


def loss_and_gradient(objective: Any, net: Any, parameter: Tensor) -> tuple[sf.LossReport, Tensor]:
    report = objective(net, torch.randn(16, 3, generator=seeded()), generator=seeded())
    return report, torch.autograd.grad(report.loss, parameter)[0]


def test_a_weight_of_a_row_multiplies_its_loss_and_its_gradient() -> None:
    net = Learner()
    plain, plain_gradient = loss_and_gradient(sf.ShortcutObjective(), net, net.weight)
    report, gradient = loss_and_gradient(TwiceTheBootstrapRows(), net, net.weight)
    assert torch.equal(report.row_loss, plain.row_loss), "row losses are reported without their weight"
    torch.testing.assert_close(report.loss, (plain.row_loss.sum() + plain.row_loss[:4].sum()) / 16)
    assert torch.equal(report.metrics["loss"], report.loss.detach())
    assert torch.equal(report.metrics["loss_bootstrap"], plain.metrics["loss_bootstrap"])
    assert not torch.allclose(gradient, plain_gradient)


def test_an_adaptive_weight_bounds_the_loss_of_each_row() -> None:
    net = Learner()
    plain, _ = loss_and_gradient(sf.ShortcutObjective(), net, net.weight)
    report, _ = loss_and_gradient(Adaptive(), net, net.weight)
    torch.testing.assert_close(report.loss, (plain.row_loss / (plain.row_loss + 0.01)).mean())


def test_what_a_network_returns_beside_its_velocity() -> None:
    """The objective gets it and gradients flow into it; samplers and other objectives leave it alone."""
    uncertainty = torch.zeros((), requires_grad=True)

    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        return affine(x_t, t, d, y), uncertainty.expand(len(x_t))

    report, gradient = loss_and_gradient(Learned(), net, uncertainty)
    torch.testing.assert_close(report.loss, report.row_loss.mean())
    torch.testing.assert_close(gradient, 1 - report.row_loss.mean()), "of e^-u err + u at u = 0"
    noise = torch.randn(4, 3, generator=seeded())
    assert torch.equal(sf.sample(net, noise, steps=3), sf.sample(affine, noise, steps=3))
    shortcut = sf.ShortcutObjective()
    data = torch.randn(16, 3, generator=seeded())
    ours, bare = (shortcut(each, data, generator=seeded()).row_loss for each in (net, affine))
    assert torch.equal(ours, bare)


def test_weights_of_another_shape_are_refused() -> None:
    class Wrong(sf.FlowMatchingObjective):
        def weigh(self, error: Tensor, targets: sf.Targets, aux: Any) -> Tensor:
            return error[:, None] * torch.ones(3)

    with pytest.raises(ValueError, match=r"one number a row, \(16,\), got \(16, 3\)"):
        Wrong()(affine, torch.zeros(16, 3), generator=seeded())


# ---- densities of times


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 1.6), (1.0, 0.5)])
def test_logit_normal_times(mean: float, std: float) -> None:
    """Kolmogorov and Smirnov's distance from the density, and from that of another mean."""
    times = draw_times(20_000, density=LogitNormal(mean=mean, std=std), generator=seeded()).double().sort().values
    assert 0 <= times[0] <= times[-1] < 1

    def distance(mean: float) -> float:
        exact = torch.special.ndtr((torch.logit(times) - mean) / std)
        return float((exact - torch.arange(1, 20_001) / 20_000).abs().max()) * math.sqrt(20_000)

    assert distance(mean) < 1.63, "the one-percent point"
    assert distance(mean + 0.1) > 3


def test_ends_of_the_unit_interval_stay_in_it() -> None:
    ends = LogitNormal(std=10).quantile(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, 1 - 2**-24]


@pytest.mark.parametrize("kind", [sf.ShortcutObjective, sf.FlowMatchingObjective])
def test_a_density_changes_the_times_of_flow_rows_alone(kind: Any) -> None:
    data = torch.zeros(4096, 2)
    plain = kind().draw(data, seeded())
    dense = kind(time_density={"kind": "logit_normal", "mean": 2.0, "std": 0.5}).draw(data, seeded())
    n = plain.n_bootstrap
    for field in ("noise", "d", "dropped"):
        assert torch.equal(getattr(plain, field), getattr(dense, field))
    assert torch.equal(plain.t[:n], dense.t[:n])
    assert float(dense.t[n:].mean()) == pytest.approx(0.87, abs=0.02)
    assert float(plain.t[n:].mean()) == pytest.approx(0.5, abs=0.02)
    if n:
        assert torch.equal(dense.t, (dense.t * 128).floor() / 128), "on the grid of 1/M"


@pytest.mark.parametrize("time_steps", [8, 32, 128])
def test_flow_rows_of_a_small_m_keep_a_fine_grid_of_times(time_steps: int) -> None:
    data = torch.zeros(4096, 2)
    plain = sf.ShortcutObjective(finest_steps=32).draw(data, seeded())
    fine = sf.ShortcutObjective(finest_steps=32, time_steps=time_steps).draw(data, seeded())
    n = plain.n_bootstrap
    for field in ("noise", "d", "dropped"):
        assert torch.equal(getattr(plain, field), getattr(fine, field)), "the network is given 1/32"
    assert torch.equal(plain.t[:n], fine.t[:n])
    assert set((fine.t[n:] * time_steps).tolist()) == set(range(time_steps))


def test_a_weight_of_bootstrap_rows_is_the_weight_written_out() -> None:
    net = Learner()
    by_hand, by_hand_gradient = loss_and_gradient(TwiceTheBootstrapRows(), net, net.weight)
    report, gradient = loss_and_gradient(sf.ShortcutObjective(bootstrap_weight=2), net, net.weight)
    assert torch.equal(report.loss, by_hand.loss)
    assert torch.equal(gradient, by_hand_gradient)
    assert loss_and_gradient(sf.ShortcutObjective(), net, net.weight)[0].targets.weight is None


@pytest.mark.parametrize(
    "setting",
    [{"time_density": {"mean": 0.0}}, {"time_steps": 64}, {"bootstrap_weight": 4}],
    ids=lambda s: next(iter(s)),
)
def test_the_released_rows_have_neither_weight_nor_density_nor_grid(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"rows 'released' .* knows no {next(iter(setting))}"):
        sf.ShortcutObjective(rows="released", **setting)
