"""Numbers that are not finite: nothing of them reaches the weights, and what is said leads to the sample."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from shortcutflow import checkpoint
from shortcutflow.data.stream import ShardStream
from shortcutflow.distributed import joined
from shortcutflow.objectives import ShortcutObjective
from shortcutflow.train.loggers import read_metrics
from shortcutflow.train.loop import train
from shortcutflow.train.nonfinite import MAX_SKIPPED_IN_A_ROW, NonFiniteError
from shortcutflow.types import Batch
from tests.train.launched import Job, furthest_apart, outcomes, tensors, tiny

SAVING_ALL = ("training.checkpoint_every=1", "training.keep_checkpoints=100")


def break_data(monkeypatch: pytest.MonkeyPatch, *batches: int) -> dict[int, Batch]:
    """NaN in the third sample of these batches, counted from 1; gives the batches as they are handed out."""
    read, handed_out = ShardStream.__next__, {}

    def sometimes_broken(stream: ShardStream) -> Batch:
        batch = read(stream)
        batch = handed_out[len(handed_out) + 1] = Batch(batch.data.clone(), batch.y, batch.keys)
        if len(handed_out) in batches:
            batch.data[2, 0, 3, 3] = math.nan
        return batch

    monkeypatch.setattr(ShardStream, "__next__", sometimes_broken)
    return handed_out


def weights_after_steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A copy of the first parameter after each optimizer step."""
    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        result = step(self, *args, **kwargs)  # type: ignore[arg-type]
        seen.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_in_the_data_stops_before_the_weights_change(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    handed_out, weights = break_data(monkeypatch, 5), weights_after_steps(monkeypatch)
    config = tiny(shards, "training.steps=9", "training.checkpoint_every=3", f"training.accumulation={accumulation}")
    with pytest.raises(NonFiniteError) as caught:
        train(config, tmp_path)
    message, key = str(caught.value), handed_out[5].keys[2]
    assert message.startswith("step 5: not finite (loss nan, gradient norm nan); ")
    assert f"the data of {key} is not finite" in message
    assert re.search(rf"bootstrap loss nan at d = 0\.\d+, t = [0-9.]+ of sample {key}", message)
    assert "the weights were not changed" in message
    assert message.endswith(f"last good checkpoint: {tmp_path / 'checkpoints' / 'step_00000003'}")
    assert len(weights) == 5
    assert not torch.equal(weights[3], weights[2])
    assert torch.equal(weights[4], weights[3]), "the optimizer took the four good steps and no more"
    assert all(w.isfinite().all() for w in weights)
    saved = tensors(tmp_path, 3)
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_infinite_loss_stops(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that is fine and a loss that is not: its kind and sample are named, no data is blamed."""
    original = ShortcutObjective.targets

    def broken(self, *args, **kwargs):
        targets = original(self, *args, **kwargs)
        targets.v[-1] = math.inf
        return targets

    monkeypatch.setattr(ShortcutObjective, "targets", broken)
    with pytest.raises(
        NonFiniteError, match=r"step 1: not finite \(loss inf.*flow loss inf at d = 0.0078125"
    ) as caught:
        train(tiny(shards), tmp_path)
    assert "no checkpoint was written before" in str(caught.value)
    assert "the data of" not in str(caught.value)
    assert "bootstrap loss" not in str(caught.value)


def test_skipped_step_changes_nothing(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_data(monkeypatch, 3)
    train(tiny(shards, "training.on_non_finite=skip", *SAVING_ALL), tmp_path)
    before, skipped, after = (tensors(tmp_path, step) for step in (2, 3, 4))
    assert furthest_apart(before, skipped) == 0, "weights, averages and optimizer"
    assert furthest_apart(skipped, after) > 1e-3, "the run went on"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert "loss" not in lines[2], "a step that was not made has no loss"
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 3)
    newest = checkpoint.latest_in(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.state()["skipped_steps"] == 1


def test_skipped_steps_are_counted_on_after_a_resume(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_data(monkeypatch, 2, 5)
    for steps in (3, 6):
        train(tiny(shards, "training.on_non_finite=skip", f"training.steps={steps}"), tmp_path, resume=True)
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 1, 1, 2, 2]


def test_too_many_skipped_in_a_row_stop(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 pass, also twice; 21 do not."""
    config = tiny(shards, "training.on_non_finite=skip", "training.steps=100", "training.log_every=100")
    most = MAX_SKIPPED_IN_A_ROW
    assert most == 20
    handed_out = break_data(monkeypatch, *range(3, 3 + most), *range(4 + most, 4 + 2 * most), *range(50, 100))
    with pytest.raises(NonFiniteError, match=f"{most + 1} steps in a row were skipped") as caught:
        train(config, tmp_path)
    assert len(handed_out) == 50 + most
    assert str(caught.value).startswith(f"step {50 + most}: not finite")


def test_waiting_for_all_is_a_barrier_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reduction on a GPU's group returns before the others have come."""
    groups: list[object] = []
    with joined("cpu", always_grouped=True) as world:
        monkeypatch.setattr(torch.distributed, "barrier", lambda group: groups.append(group))
        monkeypatch.setattr(torch.distributed, "all_reduce", None)
        world.wait_for_all()
    assert groups == [world.cpu_group]
    assert not torch.distributed.is_initialized()


def test_one_rank_alone(tmp_path: Path, shards: Path) -> None:
    """Data of rank 1 is not finite: both ranks stop at the same step, or skip it, and the message names rank 1."""
    kinds = [(parallel, kind) for parallel in ("ddp", "fsdp") for kind in ("stop", "skip")]
    jobs = [
        Job.of(
            tiny(shards, f"training.parallel={parallel}", f"training.on_non_finite={kind}", "training.steps=6",
                 *SAVING_ALL),
            tmp_path / f"{parallel} {kind}", fault="nan_in_one",
        )
        for parallel, kind in kinds
    ]  # fmt: skip
    endless = tiny(shards, "training.on_non_finite=skip", "training.steps=50")
    jobs.append(Job.of(endless, tmp_path / "endless", fault="nan_from_third"))
    # The last one: a process that failed and lives on keeps its connections, so the other would not see it end.
    jobs.append(Job.of(tiny(shards), tmp_path / "defect", fault="error_in_one"))
    *done, stopped, (first, second) = outcomes(jobs, tmp_path / "launch", processes=2)
    assert (second.error, second.message) == ("ValueError", "a defect")
    assert (first.error, first.message) == ("PeerError", "rank 1 failed: ValueError: a defect")
    for (parallel, kind), ranks in zip(kinds, done, strict=True):
        run_dir = tmp_path / f"{parallel} {kind}"
        if kind == "stop":
            assert [rank.error for rank in ranks] == ["NonFiniteError"] * 2
            assert f"rank 1: the data of {ranks[1].keys[4][1]} is not finite" in ranks[0].message
            assert "rank 0: the data" not in ranks[0].message
            assert ranks[0].message.endswith(f"last good checkpoint: {run_dir / 'checkpoints' / 'step_00000004'}")
            assert [rank.optimizer_steps for rank in ranks] == [4, 4]
        else:
            assert [rank.error for rank in ranks] == [None, None], ranks[0].message
            assert [rank.optimizer_steps for rank in ranks] == [5, 5]
            assert furthest_apart(tensors(run_dir, 4), tensors(run_dir, 5)) == 0
            assert furthest_apart(tensors(run_dir, 5), tensors(run_dir, 6)) > 1e-3
            assert read_metrics(run_dir / "metrics.jsonl")[-1]["skipped_steps"] == 1
    assert [rank.error for rank in stopped] == ["NonFiniteError"] * 2
    assert [rank.optimizer_steps for rank in stopped] == [2, 2]
    assert f"{MAX_SKIPPED_IN_A_ROW + 1} steps in a row were skipped" in stopped[0].message
