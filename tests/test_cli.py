"""The command line: what it does at toy size, and one clear line for every mistake a person can make."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import shortcutflow
from recipes.digits import paper_recipe as recipe
from shortcutflow.cli import launch, main, spread_lists

SMALL = ["backbone.options.width=16", "backbone.options.depth=1", "training.grid_steps=[1]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one smoke run of the digits recipe in it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed("train", "digits", "--smoke", "--run-dir", "runs/digits/first", *SMALL)
    return folder


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def succeed(*argv: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


def test_a_run_is_complete(inside: Path) -> None:
    run = inside / "runs/digits/first"
    names = {path.name for path in run.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "samples.png",
        "evaluation-digits.json",
    } <= names
    report = json.loads((run / "evaluation-digits.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [1, 4]
    assert all(list(row["values"]) == ["fid", "label_accuracy"] for row in report["rows"])


def test_sample(inside: Path) -> None:
    succeed("sample", "runs/digits", "--steps", "1", "3", "4", "--labels", "7", "1", "--out", "grid.png")
    with Image.open(inside / "grid.png") as picture:
        width, height = picture.size
    assert height == 3 * 50 + 2
    assert 100 < width < 250
    before = (inside / "grid.png").read_bytes()
    succeed("sample", "runs/digits/first", "--steps", "1", "3", "4", "--labels", "7", "1", "--out", "grid.png")
    assert (inside / "grid.png").read_bytes() == before, "the same seed gives the same picture"
    succeed("sample", "runs/digits/first", "--count", "3", "--seed", "5", "--weights", "current", "--out", "other.png")
    assert (inside / "other.png").read_bytes() != before


def test_a_model_folder_is_sampled_as_its_run_is(inside: Path) -> None:
    shortcutflow.load("runs/digits/first").save("models/a_model")
    for place in ("runs/digits/first", "models/a_model"):
        succeed("sample", place, "--steps", "4", "--out", f"{Path(place).name}.png")
    assert (inside / "first.png").read_bytes() == (inside / "a_model.png").read_bytes()


def test_show_config_of_recipe_and_run(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("show-config", "digits", "training.steps=7")
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"]["steps"] == 7
    succeed("show-config", "runs/digits/first")
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 4


def test_dry_run_leaves_nothing(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("train", "digits", "--dry-run", "--run-dir", "nowhere", "--objective", "flow_matching")
    out = capsys.readouterr().out
    assert '"kind": "flow_matching"' in out
    assert "would train" in out
    assert not (inside / "nowhere").exists()


def test_resume_goes_on(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("train", "digits", "--smoke", "--run-dir", "runs/other/a", *SMALL)
    succeed("train", "digits", "--resume", "--run-dir", "runs/other/a", "training.steps=6")
    lines = (inside / "runs/other/a/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_recipe_file_is_the_same_command(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        launch(recipe(), ["--dry-run", "seed=3"])
    assert stop.value.code == 0
    assert '"seed": 3' in capsys.readouterr().out
    succeed("show-config", str(Path(__file__).parent.parent / "recipes" / "digits.py"), "seed=3")
    assert '"seed": 3' in capsys.readouterr().out


def test_one_training_objective_per_name(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--objective keeps what both kinds share: label dropping stays as the recipe has it."""
    succeed("show-config", "digits_paper", "objective.kind=flow_matching")
    shown = json.loads(capsys.readouterr().out)["objective"]
    assert shown == {
        "condition_dropout": 0.1,
        "sigma_min": 0.0,
        "adaptive_power": 0.0,
        "wavelet_weights": None,
        "time_weight": None,
        "plug_in_groups": None,
        "kind": "flow_matching",
        "time_steps": None,
        "time_density": None,
    }


MISTAKES = [
    (["train", "digit"], "unknown recipe 'digit'; did you mean 'digits'? known: digits"),
    (["train", "missing.py"], "there is no recipe file missing.py"),
    (["train", "digits", "training.step=3"], "did you mean 'steps'?"),
    (["train", "digits", "trainin.steps=3"], "did you mean 'training'?"),
    (["train", "digits", "training.steps"], "section.field=value"),
    (["train", "digits", "training.steps=0"], "greater than or equal to 1"),
    (["train", "digits", "training.steps=many"], "unable to parse string as an integer, got 'many'"),
    (
        ["train", "digits", "objective.kind=diffusion"],
        "unknown kind of objective 'diffusion'; known: alpha_flow, consistency_distillation, consistency_training, ",
    ),
    (["train", "digits", "objective.finest_steps=100"], "power of two"),
    (["train", "digits", "training.global_batch_size=3"], "use at least 4 samples"),
    (["train", "digits", "target_weights=slow"], "known: ema, current"),
    (["train", "digits", "backbone.name=dti", "--run-dir", "x1"], "known: diffusers_unet, dit, dit_b"),
    (["train", "digits", "backbone.options.depht=2", "--run-dir", "x2"], "depht"),
    (["train", "digits", "backbone.options.heads=5", "--run-dir", "x3"], "heads must divide width"),
    (["train", "digits", "backbone.options.patch=3", "--run-dir", "x4"], "patch must divide"),
    (["train", "digits", "name=../up"], "name"),
    (["train", "digits", "--run-dir", "runs/digits/first"], "--resume continues it"),
    (["train", "digits", "--resume", "--run-dir", "runs/none"], "no run at runs/none"),
    (["sample", "runs/nothing"], "no run at runs/nothing"),
    (["sample", "."], "holds no run"),
    (["sample", "runs/digits/first", "--device", "tpu"], "there is no device 'tpu'"),
    (["sample", "runs/digits/first", "--guidance-scale", "nan"], "guidance_scale must be a finite number"),
    (["sample", "runs/digits/first", "--guidance-scale", "inf"], "guidance_scale must be a finite number"),
    (["sample", "runs/digits/first", "--steps", "0"], "steps must be at least 1, got 0"),
    (["sample", "runs/digits/first", "--labels", "3", "10"], "labels must be from 0 to 9, got 10"),
    (["sample", "runs/digits/first", "--labels", "3", "--count", "2"], "either labels or a count"),
    (["sample", "runs/digits/first", "--count", "0"], "number of samples must be at least 1, got 0"),
    (["sample", "runs/digits/first", "--weights", "slow"], "it has: ema, current"),
    (["sample", "runs/digits/first", "--out", "grid.jpg"], ".png"),
    (["sample", "runs/digits/first", "--out", "none/grid.png"], "no folder none"),
    (["sample"], "Missing argument 'model'; see shortcutflow sample --help"),
    (["sample", "nowhere"], "there is no run at nowhere"),
    (["evaluate", "runs/digits/first", "--steps", "abc"], "'--steps': it must be a whole number, got 'abc'; see"),
    (["trian"], "No such command 'trian'. Did you mean 'train'?"),
    (["train", "digits", "--fast"], "No such option: --fast; see shortcutflow train --help"),
    (["show-config", "runs"], "runs holds no run"),
    (["show-config", "nothing"], "unknown recipe 'nothing'"),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_mistakes(inside: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in fail(capsys, *argv)


def test_errors_of_other_code_keep_their_traceback(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_file = inside / "wrong.py"
    for lines, kind in (
        ("raise ValueError('of the recipe')", ValueError),
        ("import torch; return torch.optim.AdamW([], lr=0.1)", ValueError),
        ("raise NotImplementedError", NotImplementedError),
    ):
        recipe_file.write_text(f"def recipe():\n    {lines}\n")
        with pytest.raises(kind):
            main(["show-config", "wrong.py"])
    full = "import os, errno\n\n\ndef recipe():\n    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
    recipe_file.write_text(full)
    assert "No space left" in fail(capsys, "show-config", "wrong.py")
    recipe_file.write_text("def recipe():\n    from shortcutflow.ema import EMAConfig as A; A(decay=7)\n")
    assert "decay" in fail(capsys, "show-config", "wrong.py")
    with pytest.raises(FileNotFoundError, match="no run at"):
        main(["sample", "runs/nothing", "--traceback"])


def test_what_could_be_a_hub_id_is_first_a_run_that_is_not_there(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> str:
        raise OSError("404")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", gone)
        assert "no run or model at run/one, and the hub has none" in fail(capsys, "sample", "run/one")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "no run or model at run/one; if it is a hub id, " in fail(capsys, "sample", "run/one")


@pytest.mark.parametrize(
    ("module", "says"),
    [("sklearn.datasets", "pip install 'shortcutflow[digits]'"), ("tensorboard", "pip install 'shortcutflow[train]'")],
    ids=["evaluation", "logger"],
)
def test_a_package_that_is_lacking_is_missed_before_there_is_a_run(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, says: str
) -> None:
    assert (inside / "data/digits").is_dir(), "the data is there"
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert says in fail(capsys, "train", "digits", "--run-dir", "runs/lacking")
    assert not (inside / "runs/lacking").exists()


def test_spread_lists() -> None:
    assert spread_lists(["sample", "--steps", "1", "4", "runs/x"]) == [
        "sample", "--steps", "1", "--steps", "4", "runs/x",
    ]  # fmt: skip
    assert spread_lists(["sample", "r", "--steps", "1", "4", "--out", "x.png"]) == [
        "sample", "r", "--steps", "1", "--steps", "4", "--out", "x.png",
    ]  # fmt: skip
    assert spread_lists(["--labels", "1", "--steps", "2"]) == ["--labels", "1", "--steps", "2"]
    assert spread_lists(["a", "--out", "b", "c"]) == ["a", "--out", "b", "c"]
