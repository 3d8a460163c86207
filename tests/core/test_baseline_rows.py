"""The paper's baselines: their rows and shares, conditions, and settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Generator, Tensor

from shortcutflow.objectives import (
    ConsistencyDistillationObjective,
    ConsistencyTrainingObjective,
    Context,
    LiveReflowObjective,
    ObjectiveConfig,
    ProgressiveDistillationObjective,
    ReflowObjective,
)
from shortcutflow.types import FULL_BATCH, BatchSlice, LossReport, Targets
from tests.core.baseline_cases import BASELINES, NULL, ROWS, asked, every_baseline
from tests.core.networks import Learner, affine, zero

# ---- rows and shares


def third(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
    """A teacher that answers otherwise than the network."""
    return affine(x_t, t, d, y) / 3


def report_of(objective: Any, share: BatchSlice = FULL_BATCH, seed: int = 0) -> LossReport:
    """The loss of a share's samples, as a process has them."""
    data = torch.randn(ROWS, 2, 3, generator=Generator().manual_seed(1))[share.rows]
    return objective(
        affine, data, torch.arange(ROWS)[share.rows], target_net=affine, teacher=third, progress=0.4, null_y=NULL,
        generator=Generator().manual_seed(seed), batch_slice=share,
    )  # fmt: skip


FIELDS = ("x_t", "t", "d", "y", "v")


def differing(a: Targets, b: Targets) -> list[str]:
    return [name for name in FIELDS if not torch.equal(getattr(a, name), getattr(b, name))]


@pytest.mark.parametrize("total", [1, 2, 3, 6])
@every_baseline
def test_shares_are_the_rows_of_the_whole(objective: Any, total: int) -> None:
    whole = report_of(objective).targets
    losses = []
    for number in range(total):
        part = report_of(objective, BatchSlice(number, total))
        losses.append(part.loss)
        rows = {name: getattr(whole, name)[number::total] for name in FIELDS}
        assert differing(replace(whole, **rows), part.targets) == []
        assert part.targets.n_bootstrap == len(range(number, whole.n_bootstrap, total))
    assert "x_t" in differing(whole, report_of(objective, seed=1).targets), "another seed has other rows"
    torch.testing.assert_close(torch.stack(losses).mean(), report_of(objective).loss)


@pytest.mark.parametrize(
    ("objective", "share", "message"),
    [
        (LiveReflowObjective(reflow_fraction=1 / 12), BatchSlice(0, 3), "2 reflow rows cannot be shared by 3"),
        (
            LiveReflowObjective.released(bootstrap_every=4),
            BatchSlice(1, 4),
            "reflow rows that 4 slices divide",
        ),
        (LiveReflowObjective(reflow_fraction=1 / 100), FULL_BATCH, "no reflow row .* use at least 100"),
        (ReflowObjective(rows_per_pair=12), BatchSlice(0, 3), "2 pairs of several rows cannot be shared by 3"),
        (ReflowObjective(rows_per_pair=5), FULL_BATCH, "24 cannot be made of pairs of 5"),
    ],
    ids=["reflow rows", "released rows", "too small", "pairs", "rows of a pair"],
)
def test_batches_that_do_not_divide(objective: Any, share: BatchSlice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_of(objective, share)


def test_rows_of_a_pair_are_one_line() -> None:
    """Rows 12 apart lie on one line and have one condition."""
    rows = report_of(BASELINES["reflow_two_rows_per_pair"]).targets
    assert rows.y is not None
    assert torch.equal(rows.y[:12], rows.y[12:])
    torch.testing.assert_close(rows.v[:12], rows.v[12:])
    gap = (rows.t[12:] - rows.t[:12]).view(-1, 1, 1)
    torch.testing.assert_close(rows.x_t[12:], rows.x_t[:12] + gap * rows.v[:12])
    assert not torch.allclose(rows.v[:6], rows.v[6:12])


@pytest.mark.parametrize("name", ["consistency_training", "consistency_distillation", "progressive_distillation"])
def test_each_image_is_used_exactly_once(name: str) -> None:
    """Read off x_t with the noise at zero and t at a half."""
    data = torch.arange(1.0, ROWS + 1).view(-1, 1).expand(-1, 2)
    draw = BASELINES[name].draw(data, Generator().manual_seed(0), Context(progress=0.3))
    still = replace(
        draw, noise=torch.zeros_like(draw.noise), t=torch.full_like(draw.t, 0.5), d=torch.full_like(draw.d, 1 / 16)
    )
    objective = BASELINES[name].model_copy(update={"condition_dropout": 0})
    rows = objective.targets(zero, data, torch.arange(ROWS), still, Context(teacher=zero, null_y=NULL))
    assert (2 * rows.x_t[:, 0]).tolist() == list(range(1, ROWS + 1))


# ---- conditions


@pytest.mark.parametrize("name", [n for n, o in BASELINES.items() if o.condition_dropout > 0 and "released" not in n])
def test_dropped_rows_have_no_condition_anywhere(name: str) -> None:
    net, average, teacher, _ = asked(BASELINES[name].model_copy(update={"condition_dropout": 1.0}))
    assert (net.calls[0].y == NULL).all()
    assert all((call.y == NULL).all() for call in average.calls + teacher.calls)
    net, *_ = asked(BASELINES[name].model_copy(update={"condition_dropout": 0.0}))
    assert not (net.calls[0].y == NULL).any()


@every_baseline
def test_no_condition_stays_none(objective: Any) -> None:
    if "guidance_scale" in type(objective).model_fields:
        objective = objective.model_copy(update={"guidance_scale": 1.0})
    if objective.condition_dropout:
        with pytest.raises(ValueError, match="no condition y to drop"):
            objective(Learner(), torch.randn(ROWS, 4), teacher=affine, progress=0.2)
    objective = objective.model_copy(update={"condition_dropout": 0.0})
    report = objective(Learner(), torch.randn(ROWS, 4), teacher=affine, progress=0.2)
    assert report.targets.y is None


# ---- settings

UNION: TypeAdapter[BaseModel] = TypeAdapter(ObjectiveConfig)


@every_baseline
def test_settings_survive_json(objective: BaseModel) -> None:
    assert UNION.validate_json(objective.model_dump_json()) == objective
    assert UNION.validate_python({"kind": objective.model_dump()["kind"]}) != objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "consistency_training", "finest_steps": 100}, "power of two, at least 2, got 100"),
        ({"kind": "consistency_training", "teacher": "runs/flow"}, "teacher"),
        ({"kind": "consistency_distillation", "clip": 0}, "clip"),
        ({"kind": "progressive_distillation", "guidance_scale": -1}, "guidance_scale"),
        ({"kind": "reflow", "teacher_steps": 0}, "teacher_steps"),
        ({"kind": "reflow", "rows_per_pair": 0}, "rows_per_pair"),
        ({"kind": "live_reflow", "reflow_fraction": 2}, "reflow_fraction"),
        ({"kind": "live_reflow", "rows": "twice"}, "each_once"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNION.validate_python(settings)


def test_released_switches_become_settings() -> None:
    progressive = ProgressiveDistillationObjective.released(denoise_timesteps=64, bootstrap_cfg=True, cfg_scale=2)
    assert progressive == ProgressiveDistillationObjective(finest_steps=64, guidance_scale=2, clip=4, sigma_min=1e-5)
    assert ProgressiveDistillationObjective.released(cfg_scale=2).guidance_scale == 1, "with bootstrap_cfg only"
    assert ConsistencyDistillationObjective.released(64) == ConsistencyDistillationObjective(
        finest_steps=64, clip=4, sigma_min=1e-5
    )
    assert ConsistencyTrainingObjective.released(64) == ConsistencyTrainingObjective(finest_steps=64, sigma_min=1e-5)
    live = LiveReflowObjective.released(denoise_timesteps=64, bootstrap_every=4, cfg_scale=0, class_dropout_prob=0.2)
    assert live == LiveReflowObjective(
        finest_steps=64, guidance_scale=0, condition_dropout=0.2, sigma_min=1e-5, rows="released"
    )


def test_released_live_reflow_uses_the_first_images_twice() -> None:
    objective = LiveReflowObjective.released(bootstrap_every=4, class_dropout_prob=1.0, cfg_scale=1)
    data = torch.randn(ROWS, 4)
    draw = objective.draw(data, generator=Generator().manual_seed(0))
    rows = objective.targets(zero, data, torch.arange(ROWS), draw, Context(null_y=NULL))
    assert rows.y is not None
    assert rows.y.tolist() == [*range(6), *[NULL] * 18]
    assert draw.source is not None
    assert draw.source.tolist() == [*range(6), *range(18)]
    assert torch.equal(draw.noise[:6], draw.noise[6:12]), "reflow rows have the noise of the first flow rows"
    torch.testing.assert_close(rows.v[6:], data[:18] - (1 - 1e-5) * draw.noise[6:])
