"""Evaluations in several processes and after a kill give the numbers of one process that was left alone."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shortcutflow.evaluation.evaluate import evaluate
from shortcutflow.evaluation.feature_set import FeatureSet
from shortcutflow.evaluation.features.protocols import open_protocol
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.train.loop import train
from tests.evaluation.evaluating import Job, Plain, do_all, plain_model, small_run
from tests.processes import forked, run_forked


def values_of(out: Path) -> list[dict[str, float]]:
    return [row["values"] for row in json.loads(out.read_text())["rows"]]


def pictures_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Of a plain network every pixel is the same; of a trained one the distances are, whatever the batches."""
    train(small_run(tmp_path), tmp_path / "run")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def jobs(name: str, batch_size: int) -> tuple[Job, ...]:
        plain = Job(str(tmp_path / name / "plain.json"), samples=1200, batch_size=batch_size, steps=(1, 3))
        trained = Job(
            str(tmp_path / name / "trained.json"), run=str(tmp_path / "run"), protocol="digits", samples=1200,
            batch_size=batch_size, metrics=("fid", "kid", "label_accuracy", "coverage"),
        )  # fmt: skip
        return replace(plain, images=str(tmp_path / name / "images")), trained

    for job in jobs("one", batch_size=7):
        job.do()
    done = run_forked(do_all, *jobs("two", batch_size=64), processes=2)
    assert done.returncode == 0, done.stderr[-4000:]

    for steps in ("steps-1", "steps-3"):
        one, two = (pictures_in(tmp_path / name / "images" / steps) for name in ("one", "two"))
        assert len(one) == 1200
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)
    other = pictures_in(tmp_path / "one" / "images" / "steps-1")
    assert not np.array_equal(other["00000000.png"], other["00000010.png"]), "the control: samples do differ"
    for one, two in zip(*(values_of(tmp_path / name / "plain.json") for name in ("one", "two")), strict=True):
        assert one == pytest.approx(two, rel=1e-9)
    (alone,), (together,) = (values_of(tmp_path / name / "trained.json") for name in ("one", "two"))
    assert alone.keys() == together.keys() == {"fid", "kid", "kid_std", "label_accuracy", "coverage"}
    for name, value in alone.items():
        assert together[name] == pytest.approx(
            value, rel=1e-4, abs=2e-3 if name in ("coverage", "label_accuracy") else 1e-5
        ), name
    assert json.loads((tmp_path / "two" / "trained.json").read_text())["processes"] == 2
    assert not list(tmp_path.glob("*/evaluation-work")), "nothing unfinished stays"


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    """Samples in the checkpoints of before SIGKILL are not made again, and the numbers are those without the kill."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    job = Job(str(tmp_path / "killed" / "report.json"), samples=9000, batch_size=500, metrics=("fid", "kid"))
    with forked(do_all, replace(job, pause=0.15)) as (process,):
        until = time.monotonic() + 120
        while not (files := list(tmp_path.glob("killed/evaluation-work/steps-1-*.safetensors"))):
            assert process.is_alive(), process.exitcode
            assert time.monotonic() < until, "no checkpoint is written"
            time.sleep(0.02)
    done = FeatureSet.load(files[0]).done
    assert 2000 <= done < 9000
    assert not (tmp_path / "killed" / "report.json").exists()

    network = Plain()
    evaluate(
        Sampler(plain_model(network=network), batch_size=500), open_protocol("pixels"), Path(job.out), steps=(1,),
        metrics=job.metrics, samples=9000,
    )  # fmt: skip
    assert network.calls == (9000 - done) / 500
    replace(job, out=str(tmp_path / "whole" / "report.json")).do()
    assert values_of(tmp_path / "killed" / "report.json") == values_of(tmp_path / "whole" / "report.json")
    assert not list(tmp_path.glob("*/evaluation-work")), "checkpoints go when the report is there"
