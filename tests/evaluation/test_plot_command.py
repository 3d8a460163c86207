"""``shortcutflow plot``: every kind writes a picture, and curves of different protocols never share one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import shortcutflow
from shortcutflow.cli import main
from shortcutflow.evaluation.quality import curves_of, draw_quality, find_report, read_report

FRECHET = "Fréchet distance between Gaussian fits of the 64 pixels"
SMALL = [
    "backbone.options.width=16", "backbone.options.depth=1", "training.grid_steps=[1]", "training.steps=3",
    "training.global_batch_size=16", "evaluation=null",
]  # fmt: skip
PICTURES = {
    "trajectory": ["--steps", "4", "--labels", "3", "4"],
    "interpolation": ["--steps", "1", "2", "--pairs", "2", "--columns", "5"],
    "neighbours": ["--count", "3", "--nearest", "2"],
    "reconstruction": ["--count", "2"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a short digits run in runs/first, and its model in model."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("train", "digits", "--run-dir", "runs/first", *SMALL) == 0
        shortcutflow.load("runs/first").save(folder / "model")
    return folder


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on standard error."""
    capsys.readouterr()
    assert call(*argv) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    return err.strip()


def report(folder: Path, name: str = "evaluation.json", **parts: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"steps": s, "values": {"fid": 20 / s, "label_accuracy": 1 - 0.5 / s}} for s in (1, 4, 128)]
    whole = {"protocol": {"name": FRECHET}, "samples": 2000, "rows": rows} | parts
    (folder / name).write_text(json.dumps(whole))
    return folder / name


@pytest.mark.parametrize("place", ["runs/first", "runs", "model"])
@pytest.mark.parametrize("kind", PICTURES)
def test_each_kind_writes_a_picture(
    kind: str, place: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "data/digits"] if place == "model" and kind in ("neighbours", "reconstruction") else []
    out = tmp_path / f"{kind}.png"
    assert call("plot", kind, place, *PICTURES[kind], *data, "--out", str(out), "--seed", "3") == 0
    assert str(out) in capsys.readouterr().out
    pixels = np.asarray(Image.open(out))
    assert 100 < pixels.shape[0] < 1000
    assert 250 < pixels.shape[1] < 1000
    assert pixels.std() > 20


def test_a_run_and_its_model_are_drawn_alike(inside: Path, tmp_path: Path) -> None:
    drawn = []
    for place, seed in (("runs/first", "1"), ("model", "1"), ("model", "2")):
        assert call("plot", "interpolation", place, "--out", str(tmp_path / "i.png"), "--seed", seed) == 0
        drawn.append(np.asarray(Image.open(tmp_path / "i.png")))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trajectory", "runs/first", "--steps", "256"], "steps must be at most 32"),
        (["trajectory", "runs/first", "--steps", "0"], "steps must be at least 1, got 0"),
        (["trajectory", "runs/first", "--labels", "10"], "labels must be from 0 to 9, got 10"),
        (["trajectory", "runs/first", "--labels", "1", "--count", "2"], "either labels or a count"),
        (["trajectory", "runs/first", "--out", "t.jpg"], "--out must name a .png file, got t.jpg"),
        (["trajectory", "runs/first", "--out", "no/t.png"], "there is no folder no"),
        (["trajectory", "runs/none"], "there is no run at runs/none; runs in the same folder: runs/first"),
        (["trajectory", "runs/first", "--device", "tpu"], "there is no device 'tpu'"),
        (["trajectory", "runs/first", "--guidance-scale", "nan"], "guidance_scale must be a finite number, got nan"),
        (["neighbours", "runs/first", "--guidance-scale", "inf"], "guidance_scale must be a finite number, got inf"),
        (["interpolation", "runs/first", "--columns", "1"], "columns must be at least 2"),
        (["interpolation", "runs/first", "--pairs", "0"], "must be at least 1, got 0"),
        (["neighbours", "runs/first", "--nearest", "1798"], "there are only 1797 samples"),
        (["neighbours", "model"], "does not say what it was trained on: give --data FOLDER"),
        (["reconstruction", "runs/first", "--count", "0"], "must be at least 1, got 0"),
        (["reconstruction", "runs/first", "--weights", "none"], "has no weights 'none'; it has: ema, current"),
        (["quality", "runs/first"], "holds no evaluation*.json: measure the run first"),
        (["quality", "runs/first", "--out", "q.gif"], "--out must name a .png or .svg or .pdf file, got q.gif"),
    ],
    ids=[
        "too fine", "no steps", "label", "labels and count", "suffix", "folder", "run", "device", "nan", "inf",
        "one column", "no pairs",
        "nearest", "model without data", "no samples", "weights", "not measured", "figure's suffix",
    ],
)  # fmt: skip
def test_mistakes_are_one_line(argv: list[str], message: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fail(capsys, "plot", *argv)


def test_quality_curves(tmp_path: Path) -> None:
    first = report(tmp_path / "first")
    second = report(
        tmp_path / "second",
        rows=[{"steps": steps, "values": {"fid": fid}} for steps, fid in ((2, 3.0), (1, 5.0), (16, 2))],
    )
    figure = draw_quality([first, second])
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}  # type: ignore[union-attr]
    assert lines == {"first": [[1, 20], [4, 5], [128, 20 / 128]], "second": [[1, 5], [2, 3], [16, 2]]}
    assert axes.get_xscale() == "log"
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "16", "128"]
    assert axes.get_ylabel() == "FID (lower is better)"
    assert axes.get_yscale() == "log"
    figure = draw_quality([first], metric="label_accuracy")
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_ylabel() == "label accuracy"


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_quality_is_written_as_its_name_says(suffix: str, start: bytes, tmp_path: Path) -> None:
    file = report(tmp_path / "a $run$")
    out = tmp_path / f"q.{suffix}"
    assert call("plot", "quality", str(file.parent), str(report(tmp_path / "b").parent), "--out", str(out)) == 0
    assert out.read_bytes().startswith(start)
    if suffix == "png":
        pixels = np.asarray(Image.open(out))[..., :3]
        assert pixels.shape[:2] == (630, 960)
        assert pixels.std() > 10


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": {"name": "clean-fid"}},
        {"samples": 50_000},
        {"protocol": {"name": FRECHET, "extractor": "another"}},
        {"reference": {"statistics_sha256": "34"}},
    ],
    ids=["protocol", "samples", "extractor", "reference"],
)
def test_protocols_are_not_mixed(other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alike: dict[str, Any] = {
        "protocol": {"name": FRECHET, "extractor": "pixels"}, "reference": {"statistics_sha256": "12", "path": "x"},
        "samples": 2000,
    }  # fmt: skip
    first, second = report(tmp_path / "a", **alike), report(tmp_path / "b", **(alike | other))
    said = fail(capsys, "plot", "quality", str(first), str(second), "--out", str(tmp_path / "q.png"))
    assert "not measured alike" in said
    assert str(first) in said
    assert str(second) in said
    for value in _leaves(other):
        assert value in said
    # The same reference may lie in different places.
    alike["reference"] = {"statistics_sha256": "12", "path": "elsewhere"}
    report(tmp_path / "b", **alike)
    assert call("plot", "quality", str(first), str(second), "--out", str(tmp_path / "q.png")) == 0


def _leaves(value: Any) -> list[str]:
    return [leaf for v in value.values() for leaf in _leaves(v)] if isinstance(value, dict) else [str(value)]


def test_one_of_several_reports(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    old = report(folder)
    new = report(
        folder,
        "evaluation-clean-fid.json",
        protocol={"name": "clean-fid", "description": "words"},
        rows=[{"steps": 4, "values": {"fid": 9.5, "kid": 0.25}, "seconds": {"sampling": 1.0}}],
    )
    assert find_report(folder, protocol="clean-fid") == new
    assert find_report(old) == old
    with pytest.raises(ValueError, match=r"several reports, evaluation-clean-fid.json, evaluation.json: name the file"):
        find_report(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation-adm.json"):
        find_report(folder, protocol="adm")
    assert curves_of(read_report(new)) == {"fid": {4: 9.5}, "kid": {4: 0.25}}
    with pytest.raises(ValueError, match="no metric 'isc'; all reports have: fid, kid"):
        draw_quality([new], metric="isc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold an object, not a list"),
        ('{"rows": []}', "rows: List should have at least 1 item"),
        ('{"rows": [{"frechet": 1.0}]}', r"rows\.0\.steps: Field required"),
        ('{"rows": [{"steps": true}]}', r"rows\.0\.steps: Input should be a valid integer, got True"),
        ('{"rows": [{"steps": 1, "frechet": 1.0}]}', r"rows\.0\.values: Field required.*evaluate again"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=["cut off", "a list", "no rows", "no steps", "steps of no number", "flat", "deep"],
)
def test_what_is_no_report(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path / "evaluation.json")


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    values = ({"fid": float("nan"), "ok": True}, {"fid": 1.0, "note": "x"})
    rows = [{"steps": i + 1, "values": values[i]} for i in range(2)]
    assert curves_of(read_report(report(tmp_path, rows=rows))) == {"fid": {2: 1.0}}


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = fail(capsys, "plot", "quality", str(report(tmp_path / "a")), "--out", str(tmp_path / "q.png"))
    assert "pip install 'shortcutflow[plot]'" in said
