"""benchmarks/gpu.py: what is measured is kept and not measured again, and a part that fails stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import PARTS


class Runs:
    """In place of the processes of the parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **raised: Exception) -> None:
        self.names: list[str] = []
        self.raised = raised
        monkeypatch.setattr(gpu, "run_part", self)

    def __call__(self, name: str, *_: Any) -> list[dict[str, Any]]:
        self.names.append(name)
        if name in self.raised:
            raise self.raised[name]
        return [{"name": name, "ms": 1.0}]


def called(folder: Path, *argv: str) -> int:
    return gpu.main(["--toy", "--results", str(folder), *argv])


def parts_of(folder: Path) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads((folder / "gpu_cpu.json").read_text())["parts"]
    return parts


def test_every_part_runs_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = Runs(monkeypatch)
    assert called(tmp_path, "--only", "scan", "parity") == 0
    assert called(tmp_path) == 0
    assert runs.names == ["scan", "parity", *(name for name in PARTS if name not in ("scan", "parity"))]
    assert called(tmp_path) == 0
    assert len(runs.names) == len(PARTS)
    assert list(parts_of(tmp_path)) == list(PARTS)
    result = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert result.keys() >= {"device", "versions", "commit", "code"}


def test_other_code_or_versions_are_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = Runs(monkeypatch)
    for digest in ("one", "one", "other"):
        monkeypatch.setattr(gpu, "code_digest", lambda digest=digest: digest)
        assert called(tmp_path, "--only", "scan") == 0
    assert runs.names == ["scan"] * 2


def test_a_part_that_fails_is_kept_with_its_error_and_tried_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(monkeypatch, parity=RuntimeError("3 tests failed"))
    assert called(tmp_path, "--only", "parity", "scan") == 1
    assert runs.names == ["parity", "scan"]
    assert parts_of(tmp_path)["parity"]["error"] == "3 tests failed"
    assert "missing: parity" in capsys.readouterr().out
    runs.raised = {}
    assert called(tmp_path, "--only", "parity", "scan", "sampling") == 0
    assert runs.names[2:] == ["sampling", "parity"]
    assert "error" not in parts_of(tmp_path)["parity"]


def test_what_the_time_does_not_suffice_for_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = Runs(monkeypatch, scan=gpu.OutOfTime())
    assert called(tmp_path, "--only", "loader", "scan") == 1
    assert list(parts_of(tmp_path)) == ["loader"], "cut off is not failed"
    assert called(tmp_path, "--only", "cifar10", "sampling", "--minutes", "1") == 1
    assert runs.names == ["loader", "scan", "sampling"], "CIFAR-10 needs more than a minute"


def test_the_process_of_a_part_that_fails_or_hangs(tmp_path: Path) -> None:
    """Its error is in the message; without pictures CIFAR-10 says what to give."""
    args = gpu.parsed(["--toy", "--results", str(tmp_path), "--scratch", str(tmp_path)])
    with pytest.raises(gpu.OutOfTime):
        gpu.run_part("scan", PARTS["scan"], 0.5, args)
    args.cifar, args.toy = tmp_path / "none", True
    with pytest.raises(RuntimeError, match=r"ended with status 2:[\s\S]*none does not exist"):
        gpu.run_part("scan", PARTS["scan"], 120, args)


def test_toy_numbers_do_not_go_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--toy"])
    assert "give --results FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_all_parts_at_toy_size(tmp_path: Path) -> None:
    """As on a GPU, on a CPU: every part ends with rows, and CIFAR-10's with samples."""
    minutes = ["--minutes", "60"]
    assert called(tmp_path / "results", "--scratch", str(tmp_path / "scratch"), *minutes) == 0
    parts = parts_of(tmp_path / "results")
    assert list(parts) == list(PARTS)
    assert all(part["rows"] for part in parts.values())
    step = {row["name"]: row for row in parts["training dit_b_2, compiled"]["rows"]}
    assert step["shortcut, k = 1/4"]["tflop_per_step"] == pytest.approx(7 / 6 * step["flow_matching"]["tflop_per_step"])
    assert {(row["batch"], row["steps"]) for row in parts["sampling"]["rows"]} == {(1, 1), (1, 4), (4, 1), (4, 4)}
    (trained,) = parts["cifar10"]["rows"]
    assert (tmp_path / "results" / trained["samples"]).stat().st_size > 1000
