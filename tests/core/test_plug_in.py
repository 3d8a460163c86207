"""The mean velocity over a batch: the formula written out, its mean and variance in closed form, slices, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import shortcutflow as sf
from recipes.digits import paper_recipe
from shortcutflow.config import with_overrides
from shortcutflow.objectives import (
    AlphaFlowObjective,
    Context,
    Draw,
    GuidedShortcutObjective,
    MeanFlowObjective,
    SoFlowObjective,
)
from shortcutflow.path import expand_to, velocity
from tests.core.networks import Recorder, affine

POINTS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0], [-0.5, -1.0]], dtype=torch.float64)
"""Data: label 0 is one of the first two, label 1 one of the others, equally often."""


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def flow(**settings: Any) -> sf.FlowMatchingObjective:
    return sf.FlowMatchingObjective(**{"plug_in_groups": 1, "condition_dropout": 0.3} | settings)


def batch(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    point = torch.randint(len(POINTS), (rows,), generator=generator)
    return POINTS[point], point // 2


def drawn(objective: Any, data: Tensor, generator: Generator, context: Context) -> Draw:
    draw = objective.draw(data, generator, context)
    return replace(draw, t=draw.t.double())


def posterior_mean(x_t: Tensor, t: Tensor, points: Tensor, sigma_min: float) -> Tensor:
    """The mean velocity at one x_t where the data are equally likely one of some points."""
    start = (x_t - t * points) / (1 - (1 - sigma_min) * t)
    p = torch.softmax(-start.square().sum(1) / 2, dim=0)
    return p @ velocity(start, points, sigma_min)


@pytest.mark.parametrize("sigma_min", [0.0, 0.2])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_formula(labelled: bool, sigma_min: float) -> None:
    """Row by row, with groups, dropped labels, and rows that share a sample."""
    data, y = torch.randn(24, 2, dtype=torch.float64, generator=seeded()), torch.arange(24) // 3 % 2
    objective = flow(plug_in_groups=3, sigma_min=sigma_min, condition_dropout=0.3 * labelled)
    context = Context(null_y=2)
    draw = drawn(objective, data, seeded(), context)
    source = torch.randint(24, (24,), generator=seeded(1))
    for each in (draw, replace(draw, source=source)):
        rows = objective.targets(affine, data, y if labelled else None, each, context)
        for i in range(24):
            own = i if each.source is None else int(source[i])
            group = torch.arange(24) % 3 == own % 3
            if labelled and not each.dropped[i]:
                group &= y == y[own]
            expected = posterior_mean(rows.x_t[i], each.t[i], data[group], sigma_min)
            torch.testing.assert_close(rows.v[i], expected)
    assert labelled == bool(draw.dropped.any())


def residuals(objective: Any, sigma_min: float) -> dict[str, Tensor]:
    """Targets less the exact mean velocity, by batches: of ours, of the own pair, and of an equal mean.

    Times 1 - t, which keeps late rows from hiding the others, and 1, t and x_t.
    """
    generator, context = seeded(), Context(null_y=2)
    found: dict[str, list[Tensor]] = {"ours": [], "plain": [], "equal": []}
    for _ in range(400):
        data, y = batch(16, generator)
        draw = drawn(objective, data, generator, context)
        rows = objective.targets(affine, data, y, draw, context)
        own = velocity(draw.noise, data, sigma_min)
        left = expand_to(1 - (1 - sigma_min) * draw.t, data)
        alike = (((y[:, None] == y) | draw.dropped[:, None]) + 0.0).to(data)
        equal = own + (alike @ data / alike.sum(1, keepdim=True) - data) / left
        exact = torch.stack(
            [
                posterior_mean(x, t, POINTS if dropped else POINTS[2 * label : 2 * label + 2], sigma_min)
                for x, t, dropped, label in zip(rows.x_t, draw.t, draw.dropped, y, strict=True)
            ]
        )
        by = (left * torch.cat([torch.ones_like(left), draw.t[:, None], rows.x_t], dim=1))[:, :, None]
        for name, v in (("ours", rows.v), ("plain", own), ("equal", equal)):
            found[name].append(((v - exact)[:, None] * by).flatten(1).mean(0))
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("sigma_min", [0.0, 0.2])
def test_the_mean_over_batches_is_the_flow_and_the_variance_is_smaller(sigma_min: float) -> None:
    found = residuals(flow(sigma_min=sigma_min), sigma_min)
    errors = {name: (each.mean(0).abs() / each.std(0) * len(each) ** 0.5).max() for name, each in found.items()}
    assert errors["ours"] < 4, "in standard errors, the largest of eight"
    assert errors["plain"] < 4
    assert errors["equal"] > 20, "weights that do not know x_t are biased"
    assert found["ours"].square().mean() < 0.3 * found["plain"].square().mean()


@pytest.mark.parametrize("t", [0.0, 0.999, 1.0])
def test_at_the_ends_of_time(t: float) -> None:
    """At t = 0 any sample of a label is as likely; near t = 1 only the row's own; none divides by zero."""
    data, y = torch.randn(16, 3, generator=seeded()), torch.arange(16) % 2
    draw = flow().draw(data, seeded(), Context(null_y=2))
    draw = replace(draw, t=torch.full_like(draw.t, t))
    rows = flow().targets(affine, data, y, draw, Context(null_y=2))
    own = data - draw.noise
    assert rows.v.isfinite().all()
    if t > 0:
        torch.testing.assert_close(rows.v, own, atol=1e-5, rtol=0)
        return
    assert not torch.allclose(rows.v, own, atol=0.1)
    mean = torch.stack([data[y == label].mean(0) for label in (0, 1)])
    expected = torch.where(draw.dropped[:, None], data.mean(0), mean[y]) - draw.noise
    torch.testing.assert_close(rows.v, expected)


def test_autocast_does_not_round_them() -> None:
    """Late in time, where the velocity is a difference of samples over a short time."""
    data, y = 3 + torch.randn(64, 16, generator=seeded()), torch.arange(64) % 2
    draw = flow().draw(data, seeded(), Context(null_y=2))
    draw = replace(draw, t=0.8 + 0.2 * draw.t)
    exact = flow().targets(affine, data, y, draw, Context(null_y=2)).v
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flow().targets(affine, data, y, draw, Context(null_y=2)).v, exact)
        rounded = torch.eye(64) @ data - data
    assert rounded.abs().max() > 1e-3, "as a product is otherwise"


KINDS: dict[str, Any] = {
    "flow matching": sf.FlowMatchingObjective,
    "shortcut": sf.ShortcutObjective,
    "guided": GuidedShortcutObjective,
    "alpha-flow": AlphaFlowObjective,
    "soflow": SoFlowObjective,
    "mean flow": MeanFlowObjective,
}


def kind_of(name: str, **settings: Any) -> Any:
    return KINDS[name](**{"condition_dropout": 0.2} | settings)


def by_label(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
    return affine(x_t, t, d, y["y"] * y["guidance"] if isinstance(y, dict) else y)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_slices_have_the_targets_of_the_whole(name: str, count: int) -> None:
    data, y = torch.randn(48, 2, 3, dtype=torch.float64, generator=seeded()), torch.arange(48) % 3
    settings: dict[str, Any] = {"null_y": 3, "progress": 0.7}

    def targets(objective: Any, here: sf.BatchSlice) -> sf.Targets:
        given = data[here.rows], y[here.rows]
        return objective(by_label, *given, generator=seeded(), batch_slice=here, **settings).targets

    objective = kind_of(name, plug_in_groups=4)
    whole, other, plain = (
        targets(each, sf.BatchSlice()) for each in (objective, kind_of(name, plug_in_groups=1), kind_of(name))
    )
    for index in range(count):
        part = targets(objective, sf.BatchSlice(index, count))
        torch.testing.assert_close(part.v, whole.v[index::count])
        assert torch.equal(part.x_t, whole.x_t[index::count])
    # Only the velocities change, by the groups too.
    for rows in (other, plain):
        assert torch.equal(rows.x_t, whole.x_t)
        assert not torch.allclose(rows.v[rows.n_bootstrap :], whole.v[rows.n_bootstrap :], atol=0.01)
    changed = not torch.allclose(plain.v[: plain.n_bootstrap], whole.v[: plain.n_bootstrap])
    assert changed == (name in ("alpha-flow", "soflow", "mean flow")), "whose first leg is x_1 - x_0"


@pytest.mark.parametrize("name", KINDS)
def test_options_cost_no_evaluation(name: str) -> None:
    """All at once: as many rows as without, which are those that target_evaluations says."""
    data, y = torch.randn(32, 1, 4, 4, generator=seeded()), torch.arange(32) % 3
    more: dict[str, Any] = {"plug_in_groups": 1, "wavelet_weights": (1, 1, 2), "time_weight": "ramp"}
    for objective in (kind_of(name), kind_of(name, **more)):
        net = Recorder(by_label)
        objective(net, data, y, null_y=3, progress=0.7, generator=seeded())
        assert sum(len(call.x_t) for call in net.calls) == 32 * (1 + objective.target_evaluations(32))


def test_what_is_refused() -> None:
    data, y = torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="use coupling=null, or leave out plug_in_groups"):
        flow()(affine, data, y, null_y=1, noise=data)
    with pytest.raises(ValueError, match=r"plug_in_groups is 3, and of 2 slices .* use a multiple of 2"):
        flow(plug_in_groups=3)(affine, data, y, null_y=1, batch_slice=sf.BatchSlice(0, 2))
    with pytest.raises(ValueError, match="needs labels, whole numbers"):
        flow(condition_dropout=0)(affine, data, torch.zeros(8, 2))
    with pytest.raises(ValueError, match="has the flow's mean velocity already"):
        sf.ShortcutObjective(flow_of="teacher", plug_in_groups=1)
    with pytest.raises(ValueError, match=r"rows 'released' .* knows no plug_in_groups"):
        sf.ShortcutObjective(rows="released", plug_in_groups=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["coupling.kind=transport"], "use coupling=null, or leave out plug_in_groups"),
        (["training.accumulation=2"], "use a multiple of 2"),
        (["objective.kind=consistency_training"], "plug_in_groups"),
        (["objective.kind=reflow", "teacher=somewhere"], "plug_in_groups"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_is_refused_before_it_begins(overrides: list[str], message: str) -> None:
    """By objectives without rows of x_1 - x_0 too, which have no such setting."""
    with_overrides(paper_recipe(), ["objective.plug_in_groups=1"])
    with pytest.raises(ValueError, match=message):
        with_overrides(paper_recipe(), [*overrides, "objective.plug_in_groups=1"])
