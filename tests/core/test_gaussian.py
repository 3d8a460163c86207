"""Objectives and sampler against Gaussian data, whose shortcut model is known in closed form.

Shown: the exact shortcut is its own bootstrap target; all budgets end at the exact flow map; the flow loss of the exact
velocity is the conditional variance; small steps tend to the flow at first order; targets carry no gradient. Each check
is also given networks or formulas that are wrong in one place, and must tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import shortcutflow as sf
from shortcutflow.objectives import Draw, Objective
from shortcutflow.types import Network
from tests.core.gaussian import Gaussian, order_of

GAUSSIAN = Gaussian.example(2, 2, 2)
BUDGETS: tuple[int | Sequence[float], ...] = (1, 2, 3, 4, 5, 8, 100, 128, (0.125, 0.5, 0.25, 0.125), (0.375, 0.625))
Wrong = Callable[[Network], Network]


def told(scale: float) -> Wrong:
    """The network is told scale d instead of d."""
    return lambda net: lambda x, t, d, y: net(x, t, scale * d, y)


def flipped(net: Network) -> Network:
    return lambda x, t, d, y: -net(x, t, d, y)


def reversed_time(net: Network) -> Network:
    return lambda x, t, d, y: net(x, 1 - t, d, y)


def t_not_advanced(net: Network) -> Network:
    """Every second call believes that it stands where the first one stood."""
    calls = 0

    def wrong(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        nonlocal calls
        calls += 1
        return net(x, t - d if calls % 2 == 0 else t, d, y)

    return wrong


def x_not_advanced(net: Network) -> Network:
    """Every second call sees the state of the first one."""
    seen: list[Tensor] = []

    def wrong(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        seen.append(x)
        return net(seen[-2] if len(seen) % 2 == 0 else x, t, d, y)

    return wrong


# ---- self-consistency


def residual(targets_of: Network, generator: torch.Generator, finest_steps: int = 128) -> float:
    """How far the exact shortcut is from the bootstrap targets that a network gives, at most."""
    objective = sf.ShortcutObjective(bootstrap_fraction=1, finest_steps=finest_steps)
    data = GAUSSIAN.draw(512, generator)
    targets = objective.targets(targets_of, data, None, objective.draw(data, generator=generator))
    assert targets.n_bootstrap == 512
    assert targets.v.dtype == torch.float64
    return float((GAUSSIAN.net()(targets.x_t, targets.t, targets.d, None) - targets.v).abs().max())


@pytest.mark.parametrize("finest_steps", [2, 8, 128, 1024])
def test_exact_shortcut_is_its_own_target(finest_steps: int, generator: torch.Generator) -> None:
    assert residual(GAUSSIAN.net(), generator, finest_steps) < 1e-11


@pytest.mark.parametrize(
    "wrong",
    [told(2), told(0.5), flipped, reversed_time, t_not_advanced, x_not_advanced],
    ids=["d instead of d/2", "d/4", "sign", "1 - t", "t not advanced", "x not advanced"],
)
def test_wrong_targets_are_not_self_consistent(wrong: Wrong, generator: torch.Generator) -> None:
    assert residual(wrong(GAUSSIAN.net()), generator) > 1e-2


def test_bootstrap_loss_of_the_exact_shortcut_is_zero(generator: torch.Generator) -> None:
    objective = sf.ShortcutObjective(bootstrap_fraction=0.25)
    data = GAUSSIAN.draw(256, generator)
    assert objective(GAUSSIAN.net(), data, generator=generator).metrics["loss_bootstrap"] < 1e-24
    wrong = objective(GAUSSIAN.net(), data, target_net=t_not_advanced(GAUSSIAN.net()), generator=generator)
    assert wrong.metrics["loss_bootstrap"] > 1e-4


# ---- sampling


def distance_from_exact_ends(net: Network, generator: torch.Generator) -> float:
    """The largest distance, over all budgets, of a sampler's end points from the exact flow map."""
    noise = GAUSSIAN.noise(64, generator)
    exact = GAUSSIAN.flow_map(noise, torch.zeros(64), torch.ones(64))
    return max(float((sf.sample(net, noise, steps=steps) - exact).abs().max()) for steps in BUDGETS)


def test_all_budgets_end_at_the_exact_flow_map(generator: torch.Generator) -> None:
    assert distance_from_exact_ends(GAUSSIAN.net(), generator) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [told(0.5), told(2), flipped, reversed_time, t_not_advanced],
    ids=["d/2", "2d", "sign", "1 - t", "t not advanced"],
)
def test_wrong_networks_end_elsewhere(wrong: Wrong, generator: torch.Generator) -> None:
    assert distance_from_exact_ends(wrong(GAUSSIAN.net()), generator) > 1e-2


def moment_errors(ends: Tensor) -> tuple[float, float]:
    """Errors of mean and variance, each in its standard errors, at most over the entries of a sample."""
    n, variance = len(ends), GAUSSIAN.s**2
    mean_error = (ends.mean(0) - GAUSSIAN.mu) / (variance / n).sqrt()
    variance_error = (ends.var(0) - variance) / (variance * (2 / n) ** 0.5)
    return float(mean_error.abs().max()), float(variance_error.abs().max())


@pytest.mark.parametrize("steps", [1, 3, 128])
def test_samples_have_the_moments_of_the_data(steps: int, generator: torch.Generator) -> None:
    noise = GAUSSIAN.noise(20_000, generator)
    assert max(moment_errors(sf.sample(GAUSSIAN.net(), noise, steps=steps))) < 4.5
    # A network that follows the flow with the same few large steps shrinks the spread instead.
    if steps < 128:
        assert moment_errors(sf.sample(GAUSSIAN.net(), noise, steps=steps, flow_only=True))[1] > 10


# ---- flow loss


def excess_loss(net: Network, objective: Objective, generator: torch.Generator) -> Tensor:
    """Row losses minus the conditional variance, as z-scores: overall and in eight equal parts of time."""
    data = GAUSSIAN.draw(100_000, generator)
    report = objective(net, data, generator=generator)
    t = report.targets.t
    excess = report.row_loss - GAUSSIAN.velocity_variance(t).flatten(1).mean(1)
    parts = [excess, *(excess[(8 * t).long() == i] for i in range(8))]
    return torch.stack([part.mean() / (part.std() / len(part) ** 0.5) for part in parts])


FLOW_OBJECTIVES = [
    sf.FlowMatchingObjective(),
    sf.FlowMatchingObjective(time_steps=64),
    sf.ShortcutObjective(bootstrap_fraction=0),
]


@pytest.mark.parametrize("objective", FLOW_OBJECTIVES, ids=["uniform", "grid", "shortcut"])
def test_flow_loss_is_the_conditional_variance(objective: Objective, generator: torch.Generator) -> None:
    assert excess_loss(GAUSSIAN.net(flow_below=1 / 128), objective, generator).abs().max() < 4


@pytest.mark.parametrize(
    "wrong",
    [flipped, reversed_time, lambda net: lambda x, t, d, y: net(x, (t + 0.1).clamp(max=1), d, y)],
    ids=["sign", "1 - t", "t + 0.1"],
)
def test_wrong_velocities_have_more_loss(wrong: Wrong, generator: torch.Generator) -> None:
    z = excess_loss(wrong(GAUSSIAN.net(flow_below=1 / 128)), sf.FlowMatchingObjective(), generator)
    assert z.max() > 10


# ---- the limit of small steps


def order_in_d(limit: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> float:
    """The order in d at which the exact shortcut tends to a velocity field."""
    x_t, t = GAUSSIAN.noise(64, generator), torch.rand(64, generator=generator) * 0.9
    sizes = [2.0**-k for k in range(7, 14)]
    return order_of(
        sizes, [float((GAUSSIAN.shortcut(x_t, t, torch.full((64,), d)) - limit(x_t, t)).abs().mean()) for d in sizes]
    )


def test_shortcut_tends_to_the_velocity_at_first_order(generator: torch.Generator) -> None:
    assert order_in_d(GAUSSIAN.velocity, generator) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "wrong", [lambda x, t: -GAUSSIAN.velocity(x, t), lambda x, t: GAUSSIAN.velocity(x, t + 0.01)], ids=["sign", "late"]
)
def test_shortcut_tends_to_nothing_else(wrong: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> None:
    assert order_in_d(wrong, generator) < 0.5


def order_in_finest_step(wrong: Wrong, generator: torch.Generator) -> float:
    """The order in 1/M of the coarsest error that is left when the half steps at d = 1/M follow the flow."""
    budgets = [2**k for k in range(4, 10)]
    errors = []
    for finest_steps in budgets:
        objective = sf.ShortcutObjective(bootstrap_fraction=1, finest_steps=finest_steps)
        data = GAUSSIAN.draw(256, generator)
        draw = objective.draw(data, generator=generator)
        targets = objective.targets(wrong(GAUSSIAN.net(flow_below=1 / finest_steps)), data, None, draw)
        finest = targets.d == 2 / finest_steps
        error = targets.v - GAUSSIAN.net()(targets.x_t, targets.t, targets.d, None)
        errors.append(float(error[finest].abs().mean()))
    return order_of([1 / m for m in budgets], errors)


def test_finest_targets_inherit_the_flow_at_first_order(generator: torch.Generator) -> None:
    assert order_in_finest_step(lambda net: net, generator) == pytest.approx(1, abs=0.15)
    assert order_in_finest_step(flipped, generator) < 0.5


def order_of_sampler(wrong: Wrong, generator: torch.Generator) -> float:
    """The order in 1/N of N Euler steps along the flow."""
    noise = GAUSSIAN.noise(64, generator)
    exact = GAUSSIAN.flow_map(noise, torch.zeros(64), torch.ones(64))
    budgets = [2**k for k in range(5, 10)]
    net = wrong(GAUSSIAN.net())
    errors = [float((sf.sample(net, noise, steps=n, flow_only=True) - exact).abs().mean()) for n in budgets]
    return order_of([1 / n for n in budgets], errors)


def test_following_the_flow_is_a_method_of_first_order(generator: torch.Generator) -> None:
    assert order_of_sampler(lambda net: net, generator) == pytest.approx(1, abs=0.1)
    assert order_of_sampler(reversed_time, generator) < 0.5
    assert order_of_sampler(flipped, generator) < 0.5


def orders_of_inversion(wrong: Wrong, generator: torch.Generator) -> tuple[float, float]:
    """The orders in 1/N of the noise that data comes from, and of the data that this noise gives again."""
    data = GAUSSIAN.draw(64, generator)
    exact = GAUSSIAN.flow_map(data, torch.ones(64), torch.zeros(64))
    budgets, net = [2**k for k in range(5, 9)], GAUSSIAN.net()
    noises = [sf.invert(wrong(net), data, steps=n) for n in budgets]
    ends = [sf.sample(net, noise, steps=n, flow_only=True) for n, noise in zip(budgets, noises, strict=True)]
    sizes = [1 / n for n in budgets]
    noise_errors = [float((noise - exact).abs().mean()) for noise in noises]
    return order_of(sizes, noise_errors), order_of(sizes, [float((end - data).abs().mean()) for end in ends])


def test_data_goes_back_to_its_noise_and_round_at_first_order(generator: torch.Generator) -> None:
    for order in orders_of_inversion(lambda net: net, generator):
        assert order == pytest.approx(1, abs=0.15)
    for wrong in (reversed_time, flipped):
        assert max(orders_of_inversion(wrong, generator)) < 0.5


# ---- gradients


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(10, 16).double(), nn.Linear(16, 8).double()

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        told = torch.cat([x_t.flatten(1), t[:, None], d[:, None]], dim=1)
        return self.out(self.hidden(told).tanh()).view_as(x_t)


def loss_by_hand(net: Network, data: Tensor, draw: Draw, *, through_targets: bool) -> Tensor:
    """The shortcut loss written out from the paper, with the targets held constant or not."""
    t, d = (value.double().view(-1, 1, 1, 1) for value in (draw.t, draw.d))
    x_t = (1 - t) * draw.noise + t * data
    v1 = net(x_t, draw.t, draw.d / 2, None)
    v2 = net(x_t + d / 2 * v1, draw.t + draw.d / 2, draw.d / 2, None)
    is_bootstrap = (torch.arange(len(data)) < draw.n_bootstrap).view(-1, 1, 1, 1)
    v = torch.where(is_bootstrap, (v1 + v2) / 2, data - draw.noise)
    return (net(x_t, draw.t, draw.d, None) - (v if through_targets else v.detach())).square().mean()


def test_targets_carry_no_gradient(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    net, objective = Perceptron(), sf.ShortcutObjective(bootstrap_fraction=0.5)
    data, seed = GAUSSIAN.draw(32, generator), torch.Generator()
    report = objective(net, data, generator=seed.manual_seed(1))
    assert not report.targets.v.requires_grad
    draw = objective.draw(data, generator=seed.manual_seed(1))

    def gradient_of(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    ours = gradient_of(report.loss)
    constant, through = (
        gradient_of(loss_by_hand(net, data, draw, through_targets=through)) for through in (False, True)
    )
    assert (ours - constant).abs().max() < 1e-12
    assert (ours - through).abs().max() > 1e-3


def test_target_network_gets_no_gradient(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    net, average = Perceptron(), Perceptron()
    objective = sf.ShortcutObjective(bootstrap_fraction=0.5)
    objective(net, GAUSSIAN.draw(32, generator), target_net=average, generator=generator).loss.backward()
    assert all(p.grad is None for p in average.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
