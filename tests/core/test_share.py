"""The shares of a global batch together are its rows, and their losses' mean is its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import shortcutflow as sf
from shortcutflow.objectives import LiveReflowObjective
from shortcutflow.seeds import draw_noise_rows
from shortcutflow.types import FULL_BATCH, BatchSlice, LossReport
from tests.core.networks import Recorder, affine

ROWS = 24
OBJECTIVES: dict[str, Any] = {
    "shortcut": sf.ShortcutObjective(finest_steps=8, bootstrap_fraction=0.25),
    "an odd number of bootstrap rows": sf.ShortcutObjective(finest_steps=8, bootstrap_fraction=7 / 24),
    "guided": sf.ShortcutObjective(finest_steps=8, bootstrap_fraction=0.5, guidance_scale=2, condition_dropout=0.3),
    "one flow row": sf.ShortcutObjective(finest_steps=8, bootstrap_fraction=23 / 24),
    "a teacher's flow": sf.ShortcutObjective(finest_steps=8, bootstrap_fraction=23 / 24, flow_of="teacher"),
    "live reflow": LiveReflowObjective(finest_steps=8, reflow_fraction=23 / 24),
    "all bootstrap": sf.ShortcutObjective(bootstrap_fraction=1),
    "no bootstrap": sf.ShortcutObjective(bootstrap_fraction=0),
    "released": sf.ShortcutObjective.released(denoise_timesteps=8, bootstrap_every=4, bootstrap_cfg=True),
    "released bias": sf.ShortcutObjective.released(denoise_timesteps=8, bootstrap_every=4, bootstrap_dt_bias=True),
    "flow": sf.FlowMatchingObjective(condition_dropout=0.2),
    "flow on a grid": sf.FlowMatchingObjective.released(),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 2, 3, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS)


def loss_of(objective: Any, share: BatchSlice = FULL_BATCH, seed: int = 0) -> LossReport:
    """The loss of a share's samples, as a process has them."""
    data, y = batch()
    generator = torch.Generator().manual_seed(seed)
    return objective(
        affine, data[share.rows], y[share.rows], teacher=affine, null_y=ROWS, generator=generator, batch_slice=share
    )


@pytest.mark.parametrize("total", [1, 2, 3, 6])
@every_objective
def test_shares_are_the_rows_of_the_whole(objective: Any, total: int) -> None:
    whole = loss_of(objective)
    parts = [loss_of(objective, BatchSlice(number, total)) for number in range(total)]
    for number, part in enumerate(parts):
        for name in ("x_t", "t", "d", "y", "v"):
            expected = getattr(whole.targets, name)[number::total]
            assert torch.equal(getattr(part.targets, name), expected), f"{name} of share {number}"
        assert torch.equal(part.row_loss, whole.row_loss[number::total])
        is_bootstrap = torch.arange(ROWS)[number::total] < whole.targets.n_bootstrap
        assert part.targets.n_bootstrap == int(is_bootstrap.sum())
    torch.testing.assert_close(torch.stack([part.loss for part in parts]).mean(), whole.loss)
    # What the processes add up together has the same names in each, and is then that of the whole.
    for part in parts:
        assert list(part.means) == list(whole.means)
        assert all(value.isfinite() for value in part.metrics.values())
    for name, mean in whole.means.items():
        assert sum(part.means[name].rows for part in parts) == mean.rows, name
        torch.testing.assert_close(torch.stack([part.means[name].total for part in parts]).sum(), mean.total)


def test_every_share_calls_the_teacher() -> None:
    """Also one without a flow row: sharded, the teacher is a collective, which all processes must enter."""
    objective = sf.ShortcutObjective(finest_steps=8, bootstrap_fraction=23 / 24, flow_of="teacher")
    data, y = batch()
    for number in range(2):
        teacher, share = Recorder(affine), BatchSlice(number, 2)
        objective(affine, data[share.rows], y[share.rows], teacher=teacher, null_y=ROWS, batch_slice=share)
        assert [len(call.x_t) > 0 for call in teacher.calls] == [True] * 3, "the flow row, and two half steps"


@every_objective
def test_another_seed_has_other_rows(objective: Any) -> None:
    """The negative control of the test above, and of draws that would not depend on the generator."""
    share = BatchSlice(1, 2)
    assert not torch.equal(loss_of(objective, share, seed=1).targets.x_t, loss_of(objective).targets.x_t[share.rows])
    assert not torch.equal(loss_of(objective, BatchSlice(0, 2)).targets.x_t, loss_of(objective, share).targets.x_t)


@every_objective
def test_generators_end_alike(objective: Any) -> None:
    """Each process takes as many random numbers as the whole, so what is drawn next is the same too."""
    data, y = batch()
    ends = set()
    for share in (FULL_BATCH, BatchSlice(0, 2), BatchSlice(2, 3)):
        generator = torch.Generator().manual_seed(0)
        objective(
            affine, data[share.rows], y[share.rows], teacher=affine, null_y=ROWS, generator=generator, batch_slice=share
        )
        ends.add(float(torch.rand((), generator=generator)))
    assert len(ends) == 1


@pytest.mark.parametrize(("number", "n", "expected"), [(0, 7, 3), (1, 7, 2), (2, 7, 2), (2, 2, 0), (0, 0, 0)])
def test_rows_among_the_first(number: int, n: int, expected: int) -> None:
    share = BatchSlice(number, 3)
    assert share.count_below(n) == expected == len(torch.arange(ROWS)[share.rows][torch.arange(ROWS)[share.rows] < n])


def test_a_share_without_bootstrap_rows_is_refused() -> None:
    """It would call the target network less often than the others, which under sharding hangs."""
    objective = sf.ShortcutObjective(bootstrap_fraction=2 / ROWS)
    for number in range(3):
        with pytest.raises(ValueError, match="2 bootstrap rows cannot be shared by 3"):
            loss_of(objective, BatchSlice(number, 3))
    assert loss_of(objective, BatchSlice(1, 2)).targets.n_bootstrap == 1


def test_released_rows_that_use_anothers_samples_are_refused() -> None:
    objective = sf.ShortcutObjective.released(bootstrap_every=4)
    with pytest.raises(ValueError, match="bootstrap rows that 4 slices divide, there are 6"):
        loss_of(objective, BatchSlice(1, 4))


@pytest.mark.parametrize("total", [1, 2, 3, 4])
@every_objective
def test_a_share_draws_its_own_noise_alone(objective: Any, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control counts what one share of one draws."""
    drawn = 0
    randn = torch.randn

    def counting(*args: Any, **options: Any) -> Tensor:
        nonlocal drawn
        noise = randn(*args, **options)
        drawn += noise.numel()
        return noise

    data = torch.zeros(3072, 2, 3)
    y = torch.arange(3072)
    counts = []
    monkeypatch.setattr(torch, "randn", counting)
    for share in (FULL_BATCH, BatchSlice(total - 1, total)):
        drawn = 0
        generator = torch.Generator().manual_seed(0)
        objective(
            affine, data[share.rows], y[share.rows], teacher=affine, null_y=3072, generator=generator, batch_slice=share
        )
        counts.append(drawn)
    assert counts[0] >= data.numel()
    assert counts[1] == counts[0] // total


@pytest.mark.parametrize(("rows", "total", "most"), [(256, 1, 4), (64, 1, 1), (256, 2, 4), (256, 8, 4), (32, 1024, 1)])
def test_noise_takes_few_launches(rows: int, total: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is one; a share of few rows makes do with one block, of the least size."""
    drawn: list[int] = []
    randn = torch.randn

    def counting(*args: Any, **options: Any) -> Tensor:
        noise = randn(*args, **options)
        drawn.append(len(noise))
        return noise

    monkeypatch.setattr(torch, "randn", counting)
    draw_noise_rows(rows, (2,), torch.Generator(), BatchSlice(total - 1, total))
    assert len(drawn) <= most
    assert rows <= sum(drawn) <= max(rows, 64)


@pytest.mark.parametrize(
    ("rows", "total"), [(24, 3), (256, 128), (130, 5), (13, 13), (2048, 256), (768, 6), (1152, 8), (128, 1), (0, 1)]
)
def test_noise_is_that_of_the_whole_batch(rows: int, total: int) -> None:
    """Also where shares do not hold whole blocks."""
    generator = torch.Generator().manual_seed(3)
    whole = draw_noise_rows(rows, (2,), generator)
    for number in {0, total // 2, total - 1}:
        share = BatchSlice(number, total)
        assert torch.equal(draw_noise_rows(rows // total, (2,), generator, share), whole[share.rows])
    assert len(whole.unique()) == whole.numel(), "no two blocks are alike"
    if rows > 1000:
        assert abs(float(whole.mean())) < 0.07
        assert abs(float(whole.std()) - 1) < 0.05


def test_without_a_generator_torchs_default_one_decides() -> None:
    """As the docstrings say: ``torch.manual_seed`` makes a call repeatable."""
    data, y = batch()
    objective = OBJECTIVES["shortcut"]
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(objective(affine, data, y, null_y=ROWS).targets.x_t)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
