"""``shortcutflow evaluate``: runs and models, the report's fields, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.digits import paper_recipe as recipe
from recipes.policy_sequences.data import PushTData
from shortcutflow.cli import main, spread_lists
from shortcutflow.config import RunConfig
from shortcutflow.evaluation.features.protocols import open_protocol
from shortcutflow.evaluation.metrics import METRICS
from shortcutflow.evaluation.protocol_evaluation import ProtocolEvaluation
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.model import load
from shortcutflow.train.loop import train
from tests.evaluation.evaluating import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(small_run(folder), folder / "run")
    return folder / "run"


def command_of(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return int(stop.value.code or 0)


def test_report_says_all_that_it_takes_to_repeat(run: Path) -> None:
    digits = open_protocol("digits")
    out = run / "evaluation-digits.json"
    assert command_of("evaluate", str(run), "--protocol", "digits", "--samples", "50", "--seed", "4") == 0
    report = json.loads(out.read_text())
    assert report["protocol"] == {
        "name": "digits", "description": digits.description, "extractor": digits.extractor.name,
    }  # fmt: skip
    assert report["reference"]["source"] == "digits"
    assert report["reference"]["images"] == 1797
    assert len(report["reference"]["statistics_sha256"]) == 64
    subject = report["subject"]
    assert (subject["name"], subject["weights"], subject["step"]) == ("digits_paper", "ema", 20)
    assert len(subject["weights_sha256"]) == 64
    assert subject["network"]["name"] == "dit"
    assert [row["steps"] for row in report["rows"]] == [1, 2, 4, 128]
    assert all({"sampling", "decoding", "extraction", "distances"} <= set(row["seconds"]) for row in report["rows"])
    assert {"whole", "reference"} <= set(report["seconds"])
    assert report["samples"] == 50
    assert (report["seed"], report["guidance_scale"], report["finest_steps"], report["sampler"]) == (4, 1, 128, "euler")
    assert report["vae"] is None
    assert "i mod 10" in report["labels"]
    assert {"shortcutflow", "torch"} <= set(report["versions"])
    assert "CPU" in report["device"]


def test_a_model_folder_gives_the_numbers_of_its_run(run: Path, tmp_path: Path) -> None:
    load(run).save(tmp_path / "model")
    shared = ("--protocol", "pixels", "--samples", "40", "--steps", "1", "--reference", "digits")
    rows = []
    for place in (run, tmp_path / "model"):
        assert command_of("evaluate", str(place), *shared) == 0
        rows.append(json.loads((place / "evaluation-pixels.json").read_text())["rows"][0]["values"])
    assert rows[0] == rows[1]


def test_every_metric_may_be_listed() -> None:
    assert spread_lists(["evaluate", "--metrics", *METRICS, "runs/x"]) == [
        "evaluate", *(word for name in METRICS for word in ("--metrics", name)), "runs/x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("RUN --protocol inception", "unknown protocol 'inception'; known: clean-fid, released-code, adm"),
        ("RUN --metrics fid --metrics fod", "unknown metric 'fod'; known: fid, kid, is, precision, recall"),
        ("RUN --protocol pixels --metrics is", "metric 'is' needs class scores, which protocol pixels does not give"),
        ("RUN --protocol digits --metrics kid --reference STATS", "holds only mean and covariance: every metric but"),
        ("RUN --protocol pixels --reference STATS", "was made by protocol 'digits', not by 'pixels'"),
        ("RUN --protocol pixels --reference nowhere.npz", "nowhere.npz"),
        ("RUN --protocol pixels --reference nowhere", "there is no nowhere"),
        ("RUN --protocol digits --reference clean-fid:cifar10-train", "goes with --protocol clean-fid, not digits"),
        ("RUN --protocol digits --device tpu", "there is no device 'tpu'; known: cpu, cuda, cuda:NUMBER, mps"),
        ("RUN --protocol digits --guidance-scale nan", "guidance_scale must be a finite number, got nan"),
        ("RUN --protocol digits --guidance-scale inf", "guidance_scale must be a finite number, got inf"),
        ("--make-stats digits --protocol pixels --out x.npz --device tpu", "there is no device 'tpu'"),
        ("RUN --protocol pixels --metrics label_accuracy", "needs a classifier, which protocol pixels does not have"),
        ("RUN --samples 1", "samples must be at least 2, got 1"),
        ("RUN --metrics recall --samples 5", "metric 'recall' needs at least 6 samples, got 5"),
        ("RUN --steps 0", "steps must be at least 1, got 0"),
        ("RUN --steps 4 --steps 4", "a number of steps is given twice: 4, 4"),
        ("RUN --protocol digits --weights emma", "has no weights 'emma'; it has: ema, current"),
        ("RUN --protocol digits --extractor-weights x.pt", "takes no weights"),
        ("RUN --protocol file:nowhere.pt", "nowhere.pt"),
        ("RUN --protocol digits --out report.txt", "--out must name a .json file, got report.txt"),
        ("RUN --protocol digits --out nowhere/report.json", "there is no folder"),
        ("nowhere", "there is no run at nowhere"),
        ("", "name a run's or a model's folder, or images with --make-stats SOURCE"),
        ("RUN --with-features", "go with --make-stats"),
        ("RUN --make-stats digits --protocol pixels --out x.npz", "leave the model and --reference out"),
        ("--make-stats digits --protocol pixels", "--make-stats needs --out FILE.npz, got None"),
        ("--make-stats digits --protocol pixels --out x.npz --size 8", "digits is prepared already"),
    ],
    ids=lambda value: "" if value.startswith("RUN") or not value else None,
)
def test_mistakes_are_told_before_sampling(
    run: Path, tmp_path: Path, argv: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_sample(*_: Any) -> None:
        raise AssertionError("it samples")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampler, "samples", no_sample)
    if "STATS" in argv:
        assert command_of("evaluate", "--make-stats", "digits", "--protocol", "digits", "--out", "stats.npz") == 0
    words = argv.replace("RUN", str(run)).replace("STATS", "stats.npz").split()
    capsys.readouterr()
    assert command_of("evaluate", *words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.strip().splitlines() if "image/s" not in line]
    assert len(lines) == 1, err
    assert says in lines[0]
    assert "Traceback" not in out + err


def test_a_config_of_kind_pixels_is_the_protocol_digits() -> None:
    now = recipe()
    assert isinstance(now.evaluation, ProtocolEvaluation)
    before = {"kind": "pixels", "steps": [1, 8], "guidance_scale": 2.0}
    loaded = RunConfig.model_validate(now.model_dump(mode="json") | {"evaluation": before})
    assert loaded.evaluation == now.evaluation.model_copy(update={"steps": (1, 8), "guidance_scale": 2.0})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.protocol=nothing", "unknown protocol 'nothing'; known: clean-fid"),
        ('evaluation.metrics=["fod"]', "unknown metric 'fod'; known: fid"),
        ('evaluation.metrics=["is"]', "metric 'is' needs class scores, which protocol digits does not give"),
        ("evaluation.reference=nowhere", "there is no nowhere"),
        ("evaluation.reference=nowhere.npz", "nowhere.npz"),
        (f"data={PushTData().model_dump_json()}", "is of images, data of kind 'pusht' has samples of shape"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_training(
    override: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_of("train", "digits", "--run-dir", "run", override) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
