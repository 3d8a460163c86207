"""Runs that learn from another run: they start from its weights, replace it where their method says, and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shortcutflow import checkpoint
from shortcutflow.config import RunConfig
from shortcutflow.train.loop import train
from tests.train.test_loop import tiny

GROUPS = ("network", "average_ema", "optimizer", "teacher")


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of flow matching, and the shards that it was trained on."""
    root = tmp_path_factory.mktemp("flow")
    train(tiny(root / "digits", "objective.kind=flow_matching", "optimizer.lr=0.05"), root / "run")
    return root / "run", root / "digits"


def student(flow: tuple[Path, Path], kind: str, *overrides: str) -> RunConfig:
    teacher, shards = flow
    # Everything at once: a teacher and an objective that has none do not go together.
    config = tiny(shards).model_dump(mode="json")
    sizes = {} if kind == "reflow" else {"finest_steps": 8}
    config |= {"objective": {"kind": kind, "condition_dropout": 0.1, **sizes}, "teacher": str(teacher)}
    for override in overrides:
        section, _, value = override.partition("=")
        config["training"][section] = int(value)
    return RunConfig.model_validate(config)


def tensors(run: Path, step: int, group: str) -> dict[str, torch.Tensor]:
    return checkpoint.Checkpoint(run / "checkpoints" / f"step_{step:08d}", step).tensors(group)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_starts_from_the_teacher_and_leaves_it_alone(flow: tuple[Path, Path], tmp_path: Path) -> None:
    train(student(flow, "consistency_distillation", "steps=1"), tmp_path)
    of_teacher = tensors(flow[0], 6, "average_ema")
    assert same(tensors(tmp_path, 1, "teacher"), of_teacher), "what the teacher's run samples with"
    moved = [float((after - of_teacher[name]).abs().max()) for name, after in tensors(tmp_path, 1, "network").items()]
    assert 0 < max(moved) < 0.01, "one step away from the teacher; an initial draw would be further"


def test_progressive_distillation_replaces_its_teacher(flow: tuple[Path, Path], tmp_path: Path) -> None:
    """Nine steps of three stages: at steps 3 and 6 the average becomes the teacher."""
    train(student(flow, "progressive_distillation", "steps=9", "checkpoint_every=1", "keep_checkpoints=9"), tmp_path)
    first = tensors(flow[0], 6, "average_ema")
    for step in range(1, 10):
        # A checkpoint after step n holds the teacher that step n was made with.
        stage = (step - 1) // 3
        expected = first if stage == 0 else tensors(tmp_path, 3 * stage, "average_ema")
        assert same(tensors(tmp_path, step, "teacher"), expected), step
    assert not same(tensors(tmp_path, 9, "teacher"), first)


def test_a_resumed_run_has_the_teacher_of_its_stage(flow: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("steps=9", "checkpoint_every=4", "keep_checkpoints=9")
    train(student(flow, "progressive_distillation", *options), tmp_path / "whole")
    resumed = tmp_path / "resumed"
    train(student(flow, "progressive_distillation", *options), resumed)
    # As if it had been killed after its first checkpoint, inside the second stage.
    for later in (8, 9):
        folder = resumed / "checkpoints" / f"step_{later:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    train(student(flow, "progressive_distillation", *options), resumed, resume=True)
    for group in GROUPS:
        assert same(tensors(tmp_path / "whole", 9, group), tensors(resumed, 9, group)), group


def test_another_backbone_cannot_start_from_the_teacher(flow: tuple[Path, Path], tmp_path: Path) -> None:
    config = student(flow, "reflow")
    other = config.backbone.model_copy(update={"options": config.backbone.options | {"depth": 2}})
    with pytest.raises(ValueError, match="both need the same backbone"):
        train(config.model_copy(update={"backbone": other}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["consistency_distillation", "progressive_distillation", "reflow"])
def test_a_teacher_is_asked_for(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"objective '{kind}' needs teacher=FOLDER, a run; teacher is None"):
        tiny(tmp_path, f"objective.kind={kind}")


def test_a_teacher_nobody_learns_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective 'shortcut' takes no teacher; teacher is somewhere"):
        tiny(tmp_path, "teacher=somewhere")
