"""The paper's baselines: their solutions, their schedules, and which network they ask for what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator

from shortcutflow.objectives import (
    ConsistencyDistillationObjective,
    ConsistencyTrainingObjective,
    Context,
    LiveReflowObjective,
    ProgressiveDistillationObjective,
    ReflowObjective,
)
from shortcutflow.types import Network
from tests.core.baseline_cases import BASELINES, ROWS, always, asked, every_baseline, straight
from tests.core.gaussian import Gaussian, order_of
from tests.core.networks import Learner, Recorder, affine, zero

GAUSSIAN = Gaussian.example(2, 2, 2)
EXACT = GAUSSIAN.net()


# ---- the exact solution is a fixed point


def error(
    objective: Any, net: Network, teacher: Network | None, solution: Network, progress: float = 0.5,
    gaussian: Gaussian = GAUSSIAN,
) -> float:  # fmt: skip
    """How far targets are from the solution's own answers, at most, in self-consistency rows or else in all."""
    generator = Generator().manual_seed(0)
    data = gaussian.draw(64, generator)
    draw = objective.draw(data, generator, Context(progress=progress))
    rows = objective.targets(net, data, None, draw, Context(teacher=teacher))
    n = rows.n_bootstrap or len(rows.t)
    return float((solution(rows.x_t, rows.t, rows.d, None) - rows.v)[:n].abs().max())


@pytest.mark.parametrize("progress", [0, 0.3, 0.6, 0.99])
def test_progressive_distillation(progress: float) -> None:
    """Two exact steps are one exact step of twice the size. The first teacher is a flow and gets d = 0."""
    objective = ProgressiveDistillationObjective(finest_steps=16)
    assert error(objective, zero, EXACT if progress else always(1 / 16, GAUSSIAN.shortcut), EXACT, progress) < 1e-6
    assert error(objective, zero, GAUSSIAN.net(flow_below=1), EXACT, progress) > 1e-3


def test_consistency_distillation() -> None:
    """An exact step of the teacher stays on the trajectory, so that the exact end is its own target."""
    objective = ConsistencyDistillationObjective(finest_steps=16)
    exact_step = always(1 / 16, GAUSSIAN.shortcut)
    assert error(objective, EXACT, exact_step, EXACT) < 1e-6
    assert error(objective, EXACT, always(1 / 8, GAUSSIAN.shortcut), EXACT) > 1e-2, "steps of another size"
    assert error(objective, always(0.5, GAUSSIAN.shortcut), exact_step, EXACT) > 1e-2, "not to the end"


def test_consistency_distillation_of_the_flow_is_of_first_order() -> None:
    sizes = [1 / 16, 1 / 64, 1 / 256]
    errors = [error(ConsistencyDistillationObjective(finest_steps=round(1 / d)), EXACT, EXACT, EXACT) for d in sizes]
    assert 0.8 < order_of(sizes, errors) < 2.2
    assert errors[-1] > 1e-6


@pytest.mark.parametrize("progress", [0, 0.3, 0.6, 0.99])
def test_consistency_training_on_one_point(progress: float) -> None:
    """If all data are one point, the straight lines are the trajectories and every gap has the same solution."""
    objective, point = (
        ConsistencyTrainingObjective(finest_steps=16),
        Gaussian(GAUSSIAN.mu, torch.zeros_like(GAUSSIAN.s)),
    )
    assert error(objective, point.net(), None, point.net(), progress, point) < 1e-5
    if progress:  # at gap 1 the neighbour is the end
        assert error(objective, lambda *asked: 1.1 * point.net()(*asked), None, point.net(), progress, point) > 1e-2


def bias_at_half(progress: float, solution: Network) -> float:
    """How far the targets at t = 1/2 are from a solution on average, and on average over x_t."""
    generator = Generator().manual_seed(0)
    data = GAUSSIAN.draw(20_000, generator)
    objective = ConsistencyTrainingObjective()
    draw = objective.draw(data, generator, Context(progress=progress))
    rows = objective.targets(EXACT, data, None, replace(draw, t=torch.full_like(draw.t, 0.5)))
    off = rows.v - solution(rows.x_t, rows.t, rows.d, None)
    return float(torch.stack([off.mean(0), (off * rows.x_t).mean(0)]).abs().max())


def test_consistency_training_tends_to_the_flow_map() -> None:
    """With neighbours close together; where the neighbour is the data the solution is the flow's velocity."""
    assert bias_at_half(1.0, EXACT) < 0.02
    assert bias_at_half(1 / 7, EXACT) > 0.2
    assert bias_at_half(1 / 7, GAUSSIAN.net(flow_below=1)) < 0.1


def test_consistency_training_begins_with_the_data(generator: Generator) -> None:
    data = GAUSSIAN.draw(16, generator)
    objective = ConsistencyTrainingObjective(finest_steps=16)
    draw = objective.draw(data, generator, Context(progress=0.0))
    rows = objective.targets(always(float("nan"), GAUSSIAN.shortcut), data, None, draw)
    assert (rows.t == 0).all()
    assert (rows.d == 1).all()
    torch.testing.assert_close(rows.v, data - draw.noise)


@pytest.mark.parametrize(
    "objective", [ReflowObjective(teacher_steps=1), ReflowObjective(teacher_steps=1, rows_per_pair=4)]
)
def test_reflow(objective: ReflowObjective) -> None:
    """On exact pairs the straightened flow has no loss at all; the flow it was made from has."""
    exact_pairs = always(1, GAUSSIAN.shortcut)
    assert error(objective, zero, exact_pairs, straight(GAUSSIAN)) < 1e-6
    assert error(objective, zero, exact_pairs, EXACT) > 1e-2
    assert error(objective, zero, EXACT, straight(GAUSSIAN)) > 1e-2, "one step of the flow makes other pairs"


def test_pairs_of_more_steps_are_better_at_first_order() -> None:
    budgets = [8, 32, 128]
    errors = [error(ReflowObjective(teacher_steps=n), zero, EXACT, straight(GAUSSIAN)) for n in budgets]
    assert 0.8 < order_of([1 / n for n in budgets], errors) < 1.2


def test_live_reflow() -> None:
    """Reflow rows are solved by the straightened flow; flow rows are flow matching's."""
    objective = LiveReflowObjective(generation_steps=1)
    assert error(objective, always(1, GAUSSIAN.shortcut), None, straight(GAUSSIAN)) < 1e-6
    assert error(objective, always(1, GAUSSIAN.shortcut), None, EXACT) > 1e-2
    generator = Generator().manual_seed(0)
    data = GAUSSIAN.draw(64, generator)
    draw = objective.draw(data, generator=generator)
    rows = objective.targets(zero, data, None, draw)
    assert rows.n_bootstrap == 16
    assert set(rows.d[:16].tolist()) == {1.0}
    assert set(rows.d[16:].tolist()) == {1 / 128}
    torch.testing.assert_close(rows.v[16:], (data - draw.noise)[16:])
    torch.testing.assert_close(rows.v[:16], torch.zeros_like(rows.v[:16]))


# ---- schedules


@pytest.mark.parametrize("total", [7, 13, 700, 777, 1000, 410_000])
def test_schedules_are_exact_at_every_step(total: int) -> None:
    training, progressive = ConsistencyTrainingObjective(), ProgressiveDistillationObjective()
    for step in range(0, total, max(1, total // 700)):
        stage = step * 7 // total
        assert training.gap_at(step / total) == 2.0**-stage
        assert progressive.size_at(step / total) == 2.0**stage / 64
        assert progressive.teacher_stage(step / total) == stage
    assert progressive.size_at(1.0) == 1
    assert training.gap_at(1.0) == 1 / 128


@pytest.mark.parametrize("progress", [None, -0.1, 1.1])
@pytest.mark.parametrize("objective", [ConsistencyTrainingObjective(), ProgressiveDistillationObjective()], ids=str)
def test_a_schedule_needs_progress(objective: Any, progress: float | None) -> None:
    with pytest.raises(ValueError, match=r"pass progress=step/total_steps.*got (None|-0.1|1.1)"):
        objective.draw(torch.zeros(4, 2), context=Context(progress=progress))


@every_baseline
def test_only_progressive_distillation_changes_its_teacher(objective: Any) -> None:
    stages = [objective.teacher_stage(i / 100) for i in range(100)]
    assert (len(set(stages)) > 1) == isinstance(objective, ProgressiveDistillationObjective)


# ---- which network is asked, how often, and how


@every_baseline
def test_evaluations_are_counted(objective: Any) -> None:
    """Rows that are asked for targets, over a whole training, a batch's sample; and only by networks made for it."""
    rows = []
    for i in range(28):
        net, average, teacher, report = asked(objective, i / 28)
        assert [call.with_gradient for call in net.calls] == [True]
        assert not any(call.with_gradient for call in average.calls + teacher.calls)
        assert bool(teacher.calls) == objective.needs_teacher
        assert report.loss.requires_grad
        assert not report.targets.v.requires_grad
        rows.append(sum(len(call.x_t) for call in average.calls + teacher.calls))
    assert sum(rows) / 28 / ROWS == pytest.approx(objective.target_evaluations(ROWS))


@pytest.mark.parametrize("name", [n for n, objective in BASELINES.items() if objective.needs_teacher])
def test_a_missing_teacher_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="pass it as teacher="):
        BASELINES[name](Learner(), torch.randn(ROWS, 4), progress=0.5)


def test_what_networks_are_told() -> None:
    """The step to the end, or of the stage; the flow of a teacher, or half a stage's step."""
    for name in ("consistency_training", "consistency_distillation"):
        net, average, teacher, _ = asked(BASELINES[name], 0.6)
        for call in net.calls + average.calls:
            assert torch.equal(call.d, 1 - call.t)
        assert all((call.d == 0).all() for call in teacher.calls)
    net, _, teacher, _ = asked(BASELINES["progressive_distillation"], 0.6)
    assert (net.calls[0].d == 1 / 2).all()
    assert [set(call.d.tolist()) for call in teacher.calls] == [{1 / 4}] * 2
    assert torch.equal(teacher.calls[1].t, teacher.calls[0].t + 1 / 4)
    assert torch.equal(teacher.calls[0].t, net.calls[0].t)
    net, _, teacher, _ = asked(BASELINES["reflow"])
    assert all((call.d == 0).all() for call in net.calls + teacher.calls)
    net, average, _, _ = asked(BASELINES["live_reflow"])
    assert all((call.d == 1 / 128).all() for call in average.calls)


@pytest.mark.parametrize("kind", [ConsistencyDistillationObjective, ProgressiveDistillationObjective])
@pytest.mark.parametrize("clip", [None, 0.75])
def test_clip_bounds_the_state_after_a_step(kind: Any, clip: float | None) -> None:
    objective = kind(finest_steps=16, clip=clip)
    loud = Recorder(lambda x, t, d, y: 100 * affine(x, t, d, y))
    objective(Learner(), torch.randn(ROWS, 4), target_net=loud, teacher=loud, progress=0.5)
    largest = float(loud.calls[1].x_t.abs().max())
    assert largest == 0.75 if clip else largest > 4
