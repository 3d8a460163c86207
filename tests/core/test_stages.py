"""A trained flow made a shortcut model: stages of the training, and a frozen network whose flow is followed."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import shortcutflow as sf
from shortcutflow.objectives import Context, ProgressiveDistillationObjective, ShortcutObjective
from tests.core.gaussian import Gaussian

GAUSSIAN = Gaussian.example(3)
M = 8


def seeded() -> Generator:
    return Generator().manual_seed(0)


def always(value: float) -> sf.Network:
    return lambda x, t, d, y: torch.full_like(x, value)


def staged(**settings: object) -> ShortcutObjective:
    settings = {"bootstrap_from": 0.25, "guidance_from": 0.5, "guidance_scale": 2.0} | settings
    return ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, **settings)


@pytest.mark.parametrize(
    ("progress", "bootstrap", "guided"),
    [(0.0, 0, 0), (0.24, 0, 0), (0.25, 16, 0), (0.49, 16, 0), (0.5, 16, 5), (1, 16, 5)],
)
def test_stages_begin_at_their_share_of_the_training(progress: float, bootstrap: int, guided: int) -> None:
    draw = staged().draw(torch.zeros(32, 3), seeded(), Context(progress=progress))
    assert draw.n_bootstrap == bootstrap
    assert int(draw.guided.sum()) >= guided
    # Six may be: a third of sixteen rows, rounded up.
    assert draw.max_guided == (6 if guided else 0)


def test_a_stage_changes_the_rows_that_are_trained_on() -> None:
    data, y = torch.randn(32, 3, generator=seeded()), torch.zeros(32, dtype=torch.int64)
    reports = {
        progress: staged()(always(0.5), data, y, generator=seeded(), progress=progress, null_y=1)
        for progress in (0.0, 0.3)
    }
    assert "loss_bootstrap" not in reports[0.0].metrics
    # Zero network error on self-consistency rows of a constant network, and only those can be exact.
    assert float(reports[0.3].metrics["loss_bootstrap"]) < 1e-12
    assert float(reports[0.3].metrics["loss_flow"]) > 0.1


@pytest.mark.parametrize(
    ("begin", "progress", "bootstrap"),
    [
        (0.0, 0.0, 4),
        (0.0, 0.25, 7),
        (0.0, 0.5, 10),
        (0.0, 1, 16),
        (0.5, 0.49, 0),
        (0.5, 0.5, 4),
        (0.5, 0.75, 10),
        (0.5, 1, 16),
    ],
)
def test_the_share_of_bootstrap_rows_grows(begin: float, progress: float, bootstrap: int) -> None:
    growing = ShortcutObjective(
        finest_steps=M, bootstrap_fraction=0.5, first_bootstrap_fraction=1 / 8, bootstrap_from=begin
    )
    draw = growing.draw(torch.zeros(32, 3), seeded(), Context(progress=progress))
    assert draw.n_bootstrap == bootstrap
    assert int((draw.d > 1 / M).sum()) == bootstrap
    # At its end a training has the rows of one with a constant share, number for number.
    constant = ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5).draw(torch.zeros(32, 3), seeded())
    same = [torch.equal(getattr(draw, name), getattr(constant, name)) for name in ("noise", "t", "d", "dropped")]
    assert all(same) == (progress == 1)


def test_a_share_that_cannot_grow_is_refused() -> None:
    growing = ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, first_bootstrap_fraction=1 / 8)
    with pytest.raises(ValueError, match="progress=step/total_steps"):
        growing.draw(torch.zeros(32, 3))
    with pytest.raises(ValueError, match=r"must not be above that, 0\.25"):
        ShortcutObjective(first_bootstrap_fraction=0.5)
    with pytest.raises(ValueError, match=r"rows 'released' .* knows no first_bootstrap_fraction"):
        ShortcutObjective(rows="released", first_bootstrap_fraction=0.1)
    # Enough rows at the end, too few at first: known before the first step.
    with pytest.raises(ValueError, match="4 bootstrap rows cannot be shared by 8 slices"):
        growing.draw(torch.zeros(4, 3), seeded(), Context(progress=1.0, batch_slice=sf.BatchSlice(0, 8)))


def test_stages_need_to_know_how_far_training_is() -> None:
    with pytest.raises(ValueError, match="progress=step/total_steps"):
        staged().draw(torch.zeros(32, 3))
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        staged().draw(torch.zeros(32, 3), context=Context(progress=1.5))
    ShortcutObjective(finest_steps=M).draw(torch.zeros(32, 3))


def test_released_rows_know_neither_stages_nor_teachers() -> None:
    for settings in ({"bootstrap_from": 0.1}, {"guidance_from": 0.1}, {"flow_of": "teacher"}):
        with pytest.raises(ValueError, match="rows 'released'"):
            ShortcutObjective(rows="released", **settings)


def test_flow_rows_follow_the_teacher() -> None:
    data = torch.randn(32, 3, generator=seeded())
    objective = ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, flow_of="teacher")
    draw = objective.draw(data, generator=seeded())
    rows = objective.targets(always(1.0), data, None, draw, Context(teacher=always(7.0)))
    assert (rows.v[draw.n_bootstrap :] == 7).all()
    finest = draw.d[: draw.n_bootstrap] == 2 / M
    assert finest.any()
    assert not finest.all()
    # Half steps of 1/M are the teacher's, larger ones the network's own.
    assert (rows.v[: draw.n_bootstrap][finest] == 7).all()
    assert (rows.v[: draw.n_bootstrap][~finest] == 1).all()


@pytest.mark.parametrize("m", [8, 64, 128])
def test_a_flow_is_followed_whatever_its_own_finest_steps(m: int) -> None:
    """A flow with M = 128 told 1/64 would be asked for a step that it never learnt: here that is not a number."""

    def flow(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        learnt = (d <= 1 / 128).view(-1, 1)
        return torch.where(learnt, GAUSSIAN.velocity(x, t), torch.nan)

    data = GAUSSIAN.draw(64, seeded())
    shortcut = ShortcutObjective(finest_steps=m, bootstrap_fraction=0.5, flow_of="teacher")
    for objective in (shortcut, ProgressiveDistillationObjective(finest_steps=m)):
        draw = objective.draw(data, seeded(), Context(progress=0.0))
        rows = objective.targets(always(0.0), data, None, draw, Context(teacher=flow))
        assert rows.v.isfinite().all()
        finest = (rows.d * m).round() <= 2
        assert (rows.v[finest] != 0).any()
    later = ProgressiveDistillationObjective(finest_steps=m)
    told = []

    def student(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        told.append(d)
        return x

    draw = later.draw(data, seeded(), Context(progress=1.5 / (m.bit_length() - 1)))
    later.targets(always(0.0), data, None, draw, Context(teacher=student))
    assert all((d == 2 / m).all() for d in told), "later teachers get the step that they have learnt"


def test_an_exact_teacher_and_network_leave_no_error() -> None:
    """On a Gaussian the exact average velocities are a fixed point: only the Euler error of 1/M remains."""
    errors = []
    for m in (16, 64):
        data = GAUSSIAN.draw(512, seeded())
        objective = ShortcutObjective(finest_steps=m, bootstrap_fraction=0.5, flow_of="teacher")
        exact = GAUSSIAN.net(flow_below=1 / m)
        errors.append(float(objective(exact, data, teacher=exact, generator=seeded()).loss))
        wrong = objective(exact, data, teacher=always(0.0), generator=seeded())
        assert float(wrong.loss) > 100 * errors[-1]
    assert errors[1] < errors[0] / 4


def test_a_teacher_is_asked_for() -> None:
    objective = ShortcutObjective(finest_steps=M, flow_of="teacher")
    assert objective.needs_teacher
    assert not ShortcutObjective(finest_steps=M).needs_teacher
    with pytest.raises(ValueError, match="pass it as teacher="):
        objective(always(0.0), torch.zeros(32, 3))


def test_the_teacher_is_guided_where_targets_are() -> None:
    """Guided rows are those of d = 2/M, so it is the teacher that is asked without its condition too."""

    def by_label(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return torch.ones_like(x) * y.to(x).view(-1, *(1,) * (x.ndim - 1))

    data, y = torch.randn(32, 3, generator=seeded()), torch.full((32,), 3)
    objective = ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, flow_of="teacher", guidance_scale=2.0)
    draw = objective.draw(data, generator=seeded())
    rows = objective.targets(always(0.0), data, y, draw, Context(teacher=by_label, null_y=1))
    assert (rows.v[: draw.n_bootstrap][draw.guided] == 1 + 2 * (3 - 1)).all()
    assert (rows.v[draw.n_bootstrap :] == 3).all(), "flow rows stay without guidance, a sampler may add it"


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("flow_of", ["data", "teacher"])
@pytest.mark.parametrize("stages", [(0.0, 0.0), (0.25, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("first", [None, 0.25])
def test_counted_evaluations_are_those_made(
    flow_of: str, guidance: float, stages: tuple[float, float], first: float | None
) -> None:
    rows = 0

    def counting(x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return torch.zeros_like(x)

    begin = {"bootstrap_from": stages[0], "guidance_from": stages[1], "first_bootstrap_fraction": first}
    objective = ShortcutObjective(
        finest_steps=M, bootstrap_fraction=0.5, guidance_scale=guidance, flow_of=flow_of, **begin
    )
    data, y = torch.randn(32, 3, generator=seeded()), torch.zeros(32, dtype=torch.int64)
    steps = 64
    for step in range(steps):
        objective.targets(
            counting,
            data,
            y,
            objective.draw(data, seeded(), Context(progress=(step + 0.5) / steps)),
            Context(teacher=counting, null_y=1),
        )
    assert rows / (steps * 32) == pytest.approx(objective.target_evaluations(32))
    if first is not None:
        constant = objective.model_copy(update={"first_bootstrap_fraction": None})
        assert rows / (steps * 32) < 0.95 * constant.target_evaluations(32)
