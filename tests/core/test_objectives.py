"""What objectives do with a batch: which sample, time, size and condition each row gets, and which network is asked.

Each property is stated as a function of rows or calls, and the same function is given a case where it does not hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import shortcutflow as sf
from shortcutflow.objectives import Context, Draw, Objective
from shortcutflow.types import Targets
from tests.core.networks import Falsy, Learner, Recorder, affine, zero

OBJECTIVES: dict[str, Any] = {
    "shortcut": sf.ShortcutObjective(),
    "shortcut_all_bootstrap": sf.ShortcutObjective(bootstrap_fraction=1),
    "shortcut_released": sf.ShortcutObjective.released(class_dropout_prob=0),
    "flow": sf.FlowMatchingObjective(),
    "flow_grid": sf.FlowMatchingObjective(time_steps=64),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
SHAPES = [(3, 8, 8), (10, 4), (6,)]


def images_used(objective: Any, batch: int) -> list[int]:
    """The sample of each row, sorted: read off x_t with the noise at zero and t at a half."""
    data = torch.arange(1.0, batch + 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    draw = objective.draw(data, generator=Generator().manual_seed(0))
    still = dataclasses.replace(draw, noise=torch.zeros_like(draw.noise), t=torch.full_like(draw.t, 0.5))
    x_t = objective.targets(zero, data, None, still).x_t
    return sorted((2 * x_t.flatten(1).mean(1)).round().int().tolist())


# ---- rows


@pytest.mark.parametrize("batch", [4, 10, 64])
@pytest.mark.parametrize("name", ["shortcut", "shortcut_all_bootstrap", "flow", "flow_grid"])
def test_each_image_is_used_exactly_once(name: str, batch: int) -> None:
    assert images_used(OBJECTIVES[name], batch) == list(range(1, batch + 1))


def test_released_rows_do_not_use_each_image_once() -> None:
    assert images_used(OBJECTIVES["shortcut_released"], 64) != list(range(1, 65))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_objective
def test_rows_of_any_shape(objective: Objective, shape: tuple[int, ...], generator: Generator) -> None:
    data = torch.randn(16, *shape, generator=generator)
    report = objective(affine, data, torch.arange(16), generator=generator)
    targets = report.targets
    assert targets.y is not None
    assert targets.x_t.shape == targets.v.shape == (16, *shape)
    assert targets.t.shape == targets.d.shape == report.row_loss.shape == (16,)
    assert targets.t.dtype == targets.d.dtype == torch.float32
    by_hand = [
        float(
            (affine(*(value[i : i + 1] for value in (targets.x_t, targets.t, targets.d, targets.y))) - v).pow(2).mean()
        )
        for i, v in enumerate(targets.v)
    ]
    assert report.row_loss.tolist() == pytest.approx(by_hand, rel=1e-4)
    assert float(report.loss) == pytest.approx(sum(by_hand) / 16, rel=1e-4)
    assert float(report.loss) != pytest.approx(sum(by_hand), rel=1e-4)


def line_error(data: Tensor, draw: Draw | Draw, targets: Targets, sign: float = 1) -> float:
    """How far flow rows are from the straight line and its velocity (data minus noise if sign is 1), row by row."""
    worst = 0.0
    for i in range(targets.n_bootstrap, len(data)):
        t = float(targets.t[i])
        line, v = (1 - t) * draw.noise[i] + t * data[i], sign * (data[i] - draw.noise[i])
        worst = max(worst, float((line - targets.x_t[i]).abs().max()), float((v - targets.v[i]).abs().max()))
    return worst


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["shortcut", "flow", "flow_grid"])
def test_flow_rows_follow_the_straight_line(name: str, shape: tuple[int, ...], generator: Generator) -> None:
    objective, data = OBJECTIVES[name], torch.randn(16, *shape, generator=generator)
    draw = objective.draw(data, generator=generator)
    targets = objective.targets(zero, data, None, draw)
    assert line_error(data, draw, targets) < 1e-6
    assert line_error(data, draw, targets, sign=-1) > 0.1
    assert line_error(data.flip(0), draw, targets) > 0.1


def test_rows_are_bootstrap_rows_then_flow_rows(generator: Generator) -> None:
    targets = sf.ShortcutObjective(bootstrap_fraction=0.25)(
        affine, torch.randn(64, 3, generator=generator), generator=generator
    ).targets
    assert targets.n_bootstrap == 16
    assert (targets.d[:16] > 1 / 128).all()
    assert (targets.d[16:] == 1 / 128).all()
    assert ((targets.t / targets.d) % 1 == 0).all()
    flow = sf.FlowMatchingObjective()(affine, torch.randn(64, 3, generator=generator), generator=generator).targets
    assert flow.n_bootstrap == 0
    assert (flow.d == 0).all()


# ---- conditions


def dropped_rates(objective: Any, generator: Generator) -> tuple[float, float]:
    """The rates of null labels on bootstrap and on flow rows, each minus 0.3, in standard errors."""
    data, null = torch.randn(64, 2, generator=generator), 9
    hits: list[list[Tensor]] = [[], []]
    for _ in range(200):
        draw = objective.draw(data, generator=generator)
        targets = objective.targets(zero, data, torch.ones(64).long(), draw, Context(null_y=null))
        hits[0].append(targets.y[: targets.n_bootstrap] == null)
        hits[1].append(targets.y[targets.n_bootstrap :] == null)
    flags = [torch.cat(kind).double() for kind in hits]
    bootstrap, flow = ((f.mean() - 0.3) / (0.21 / len(f)) ** 0.5 if len(f) else torch.zeros(()) for f in flags)
    return float(bootstrap), float(flow)


@pytest.mark.parametrize(
    "objective",
    [sf.ShortcutObjective(condition_dropout=0.3), sf.FlowMatchingObjective(condition_dropout=0.3)],
    ids=["shortcut", "flow"],
)
def test_labels_are_dropped_at_their_rate_on_all_rows(objective: Any, generator: Generator) -> None:
    assert max(map(abs, dropped_rates(objective, generator))) < 4.5


def test_rates_tell_other_droppings_apart(generator: Generator) -> None:
    bootstrap, flow = dropped_rates(sf.ShortcutObjective.released(class_dropout_prob=0.3), generator)
    assert bootstrap < -10, "the released rows keep all labels of bootstrap rows"
    assert abs(flow) < 4.5
    assert min(dropped_rates(sf.ShortcutObjective(condition_dropout=0.4), generator)) > 10


CONDITIONS = {
    "labels": (torch.arange(32) % 7, 7),
    "vectors": (torch.linspace(1, 2, 96).view(32, 3), torch.tensor([-1.0, 0.0, -2.0])),
    "vectors, one number": (torch.linspace(1, 2, 96).view(32, 3), 0.0),
    "matrices": (torch.linspace(1, 2, 192).view(32, 2, 3), torch.zeros(2, 3)),
}


@pytest.mark.parametrize(("y", "null"), CONDITIONS.values(), ids=CONDITIONS.keys())
@pytest.mark.parametrize("kind", [sf.ShortcutObjective, sf.FlowMatchingObjective])
def test_rows_have_their_own_condition_or_none(kind: Any, y: Tensor, null: Any, generator: Generator) -> None:
    objective, data = kind(condition_dropout=0.5), torch.randn(32, 4, generator=generator)
    draw = objective.draw(data, generator=generator)
    net = Recorder(affine)
    targets = objective.targets(net, data, y, draw, Context(null_y=null))
    assert targets.y.dtype == y.dtype
    assert 0 < draw.dropped.sum() < 32
    nulls = torch.as_tensor(null, dtype=y.dtype).expand_as(y)
    for i, dropped in enumerate(draw.dropped):
        own, none = torch.equal(targets.y[i], y[i]), torch.equal(targets.y[i], nulls[i])
        assert (own, none) == (not dropped, bool(dropped)), i
    assert all(call.y is not None and torch.equal(call.y, targets.y[: len(call.y)]) for call in net.calls)


@every_objective
def test_no_condition_stays_none(objective: Objective, generator: Generator) -> None:
    net = Recorder(affine)
    report = objective(net, torch.randn(32, 4, generator=generator), generator=generator)
    assert report.targets.y is None
    assert [call.y for call in net.calls] == [None] * len(net.calls)
    assert net.calls


# ---- which network is asked, and how


def test_target_network_is_asked_for_targets_only(generator: Generator) -> None:
    log: list[str] = []
    net, average = Recorder(Learner(), "net", log=log), Recorder(Learner(), "average", log=log)
    objective, data = sf.ShortcutObjective(), torch.randn(16, 4, generator=generator)
    objective(net, data, target_net=average, generator=generator)
    assert log == ["average", "average", "net"]
    assert [len(call.x_t) for call in average.calls] == [4, 4]
    assert [call.with_gradient for call in average.calls + net.calls] == [False, False, True]


def test_without_one_the_network_makes_its_own_targets(generator: Generator) -> None:
    net = Recorder(Learner())
    report = sf.ShortcutObjective()(net, torch.randn(16, 4, generator=generator), generator=generator)
    assert [(len(call.x_t), call.with_gradient) for call in net.calls] == [(4, False), (4, False), (16, True)]
    assert report.loss.requires_grad
    assert not report.targets.v.requires_grad


def test_flow_matching_asks_once(generator: Generator) -> None:
    net, average = Recorder(Learner()), Recorder(Learner())
    sf.FlowMatchingObjective()(net, torch.randn(16, 4, generator=generator), target_net=average, generator=generator)
    assert (len(net.calls), len(average.calls)) == (1, 0)


def test_a_module_that_counts_as_false_is_still_the_target_network(generator: Generator) -> None:
    falsy = Falsy()
    assert not falsy
    net, data, objective = (
        Learner(),
        torch.randn(16, 4, generator=generator),
        sf.ShortcutObjective(bootstrap_fraction=0.5),
    )
    with torch.no_grad():
        falsy.weight.add_(5)
    draw = objective.draw(data, generator=generator.manual_seed(1))
    used = objective(net, data, target_net=falsy, generator=generator.manual_seed(1)).targets.v
    assert torch.equal(used, objective.targets(falsy, data, None, draw).v)
    assert not torch.allclose(used, objective.targets(net, data, None, draw).v)


def test_half_steps(generator: Generator) -> None:
    """The calls themselves: d/2 twice, the second from the state and the time that the first one reaches."""
    net, objective = Recorder(affine), sf.ShortcutObjective(bootstrap_fraction=1)
    data = torch.randn(32, 4, generator=generator)
    targets = objective.targets(net, data, None, objective.draw(data, generator=generator))
    first, second = net.calls
    assert torch.equal(first.d, targets.d / 2)
    assert torch.equal(second.d, targets.d / 2)
    assert torch.equal(first.t, targets.t)
    assert torch.equal(second.t, targets.t + targets.d / 2)
    assert not torch.equal(second.t, targets.t)
    v1 = affine(first.x_t, first.t, first.d, None)
    torch.testing.assert_close(second.x_t, targets.x_t + targets.d[:, None] / 2 * v1)
    assert not torch.allclose(second.x_t, targets.x_t + targets.d[:, None] * v1)
    torch.testing.assert_close(targets.v, (v1 + affine(second.x_t, second.t, second.d, None)) / 2)


def largest_bootstrap_state(clip: float | None, generator: Generator) -> tuple[float, float]:
    """The largest half-way state and target of a network whose answers are large."""
    net, data = Recorder(lambda x, t, d, y: 50 * affine(x, t, d, y)), torch.randn(32, 4, generator=generator)
    objective = sf.ShortcutObjective(bootstrap_fraction=0.5, clip=clip)
    targets = objective.targets(net, data, None, objective.draw(data, generator=generator))
    return float(net.calls[1].x_t.abs().max()), float(targets.v[: targets.n_bootstrap].abs().max())


def test_clip_bounds_half_way_states_and_targets(generator: Generator) -> None:
    assert largest_bootstrap_state(0.75, generator) == (0.75, 0.75)
    assert min(largest_bootstrap_state(None, generator)) > 4


# ---- random numbers


@every_objective
def test_the_generator_decides_everything(objective: Objective) -> None:
    torch.manual_seed(0)
    data, y = torch.randn(32, 4), torch.arange(32)

    def numbers(seed: int) -> Tensor:
        report = objective(affine, data, y, null_y=0, generator=Generator().manual_seed(seed))
        targets = report.targets
        return torch.cat([report.row_loss, targets.t, targets.d, targets.x_t.flatten(), targets.v.flatten()])

    first = numbers(0)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(first, numbers(0))
    assert not torch.equal(first, numbers(1))
