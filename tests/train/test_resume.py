"""What a resume keeps: the run itself when it is refused, its numbers, the stage of its schedule, its teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.distributed import World
from shortcutflow.launch import Options, run_recipe
from shortcutflow.models.model import load
from shortcutflow.smoke import smoke
from shortcutflow.train.loggers import read_metrics
from shortcutflow.train.loop import train
from shortcutflow.train.resume import Position, agreed_start
from tests.train.test_loop import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 2 steps of 8 samples, and its shards."""
    root = tmp_path_factory.mktemp("finished")
    train(tiny(root / "digits", "training.steps=2", "training.grid_steps=[1]"), root / "run")
    return root / "run", root / "digits"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["backbone.options.depth=2"], "another network or other EMAs"),
        (["emas.slow.decay=0.9"], "emas.slow"),
        (['emas={"ema": {}, "slow": {}}'], "average_slow"),
        (["objective.finest_steps=7"], "power of two"),
        (["optimizer.betas=[2,3]"], "optimizer.betas.0: Input should be less than 1"),
        (["training.accumulation=8"], "1 bootstrap rows|2 bootstrap rows"),
        (["data.kind=shards", "data.folder=nowhere"], "nowhere"),
        (["training.device=cuda"], "this machine has 0 GPUs"),
        (["backbone.options.width=24", "backbone.options.heads=2"], "is \\(16"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_refused_resume_changes_nothing(finished: tuple[Path, Path], overrides: list[str], says: str) -> None:
    before = contents(finished[0])
    with pytest.raises((ValueError, OSError), match=says):
        run_recipe(tiny(finished[1]), overrides, Options(run_dir=finished[0], resume=True))
    assert contents(finished[0]) == before


def test_a_folder_with_a_run_is_not_begun_anew(finished: tuple[Path, Path], tmp_path: Path) -> None:
    before = contents(finished[0])
    with pytest.raises(ValueError, match="holds a run already: --resume"):
        train(tiny(finished[1]), finished[0])
    assert contents(finished[0]) == before
    (tmp_path / "photograph.jpg").write_text("mine")
    with pytest.raises(ValueError, match=r"photograph\.jpg"):
        train(tiny(finished[1]), tmp_path)
    assert contents(tmp_path) == {"photograph.jpg": b"mine"}


def test_images_are_counted_over_other_batch_sizes(finished: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    for steps, batch in ((3, 16), (4, 4)):
        more = [f"training.steps={steps}", f"training.global_batch_size={batch}", "training.grid_steps=[1]"]
        train(tiny(finished[1], *more), tmp_path / "run", resume=True)
    seen = [line["images_seen"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert seen == [8, 16, 32, 36]


def test_without_a_checkpoint_the_earlier_numbers_are_kept(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    train(RunConfig.load(finished[0]), tmp_path / "run", resume=True)
    assert "has no checkpoint, so training begins at step 0" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.1.jsonl").read_bytes() == before


def test_schedules_go_on_from_where_they_were() -> None:
    assert [Position().progress_at(step, 10) for step in range(10)] == [step / 10 for step in range(10)]
    state = {"skipped_steps": 0, "images_seen": 40, "config": {"training": {"steps": 10}}}
    same = Position.of(5, state, 10)
    assert same.progress_at(7, 10) == 7 / 10
    for steps in (6, 20, 100):
        other = Position.of(5, state, steps)
        reached = [other.progress_at(step, steps) for step in range(4, steps)]
        assert reached[0] == 4 / 10
        assert reached == sorted(reached)
        assert reached[-1] < 1
    again = Position.of(12, state | {"anchor": other.anchor, "config": {"training": {"steps": 100}}}, 20)
    assert again.progress_at(11, 20) == pytest.approx(other.progress_at(11, 100))


@pytest.mark.parametrize("of_first", [False, True])
def test_one_restarted_process_is_enough_and_the_first_says_from_where(
    finished: tuple[Path, Path], tmp_path: Path, of_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents of torchrun count their own restarts only; a second rank may not see the first's files yet."""

    class Seen(World):
        def gather(self, something: object) -> list[object]:
            mine_first = [something, self.others.pop(0)]  # type: ignore[attr-defined]
            return mine_first if self.rank == 0 else mine_first[::-1]

    # The first rank was not restarted and has the files; the other was, and sees none.
    first, second = (Seen(rank, 2, torch.device("cpu")) for rank in range(2))
    object.__setattr__(first, "others", [True, (None, None)])
    object.__setattr__(second, "others", [False, (None, 2)])
    found = agreed_start(finished[0], first, resume=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert agreed_start(tmp_path / "not-there-yet", second, resume=False) is not None
    assert found is not None
    assert found.step == 2
    assert (agreed_start(finished[0], World(0, 1, torch.device("cpu")), resume=of_first) or found).step == 2


def test_a_resume_needs_neither_start_nor_teacher(finished: tuple[Path, Path], tmp_path: Path) -> None:
    flow = tiny(finished[1], "objective.kind=flow_matching", "training.steps=1", "training.grid_steps=[1]")
    train(flow, tmp_path / "flow")
    taught = [
        f"start={tmp_path}/flow", f"teacher={tmp_path}/flow", "objective.flow_of=teacher", "objective.finest_steps=64",
        "training.grid_steps=[1]",
    ]  # fmt: skip
    train(tiny(finished[1], *taught, "training.steps=2"), tmp_path / "run")
    (tmp_path / "flow").rename(tmp_path / "moved")
    train(tiny(finished[1], *taught, "training.steps=3"), tmp_path / "run", resume=True)
    assert load(tmp_path / "run").config.step == 3


def test_batches_too_small_for_the_shares_are_refused_before_anything_is_written(finished: tuple[Path, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"2 bootstrap rows cannot be shared by 4 slices \(processes times accumulation\)"
    ):
        tiny(finished[1], "training.accumulation=4")


@pytest.mark.parametrize("kind", ["live_reflow", "shortcut"])
def test_a_smoke_run_has_rows_of_every_kind_for_each_process(
    finished: tuple[Path, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = with_overrides(tiny(finished[1], "training.global_batch_size=64"), [f"objective.kind={kind}"])
    assert smoke(config).training.global_batch_size == 16


def test_what_needs_labels_is_refused_without_them(finished: tuple[Path, Path]) -> None:
    config = tiny(finished[1], "objective.condition_dropout=0.1", "objective.guidance_scale=2")
    unlabelled = config.data.describe()._replace(num_classes=None)
    with pytest.raises(ValueError, match=r"objective.condition_dropout and objective.guidance_scale need labels"):
        config.check_conditions(unlabelled)
    config.check_conditions(config.data.describe())
    tiny(finished[1], "objective.condition_dropout=0").check_conditions(unlabelled)


def test_an_average_gets_another_kind_as_a_section_does(finished: tuple[Path, Path]) -> None:
    kept = tiny(finished[1], "emas.ema.kind=power", "emas.ema.sigma_rel=0.1").emas["ema"]
    assert (kept.kind, kept.sigma_rel) == ("power", 0.1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"unknown kind of EMA 'powr'; .* known: exponential, power"):
        tiny(finished[1], "emas.ema.kind=powr")
