"""The benchmark commands run, at toy size."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE, ROOT, run_forked, script


def run(*argv: str, patience: float = PATIENCE) -> str:
    done = run_forked(script, ROOT, ROOT / argv[0], *argv[1:], patience=patience)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_train_step_of_digits_beside_another_command() -> None:
    other = f"{sys.executable} -c \"print('compiling'); print('{{\\\"ms_median\\\": 1000}}')\""
    out = run("benchmarks/train_step.py", "digits", "--steps", "3", "--rounds", "1", "--reference-command", other)
    ours = re.search(r"ours, eager: ms_median ([\d.]+), ms_min [\d.]+, times_faster ([\d.]+)", out)
    assert ours, out
    ms, ratio = map(float, ours.groups())
    assert abs(ms * ratio / 1000 - 1) < 0.01
    assert "released code, this run: ms_median 1000" in out


@pytest.mark.slow
def test_train_step_of_a_dit() -> None:
    options = ["--backbone", "dit_s_8", "--batch", "8", "--steps", "1", "--no-compile", "--device", "cpu"]
    out = run("benchmarks/train_step.py", "dit", *options)
    tflop = [float(value) for value in re.findall(r"tflop_per_step ([\d.]+)", out)]
    assert len(tflop) == 4, out
    # Two more forwards on k of the rows, where training costs three: a sixth more at k = 1/4, a twelfth at 1/8.
    assert abs(tflop[1] / tflop[0] - (1 + 2 / 4 / 3)) < 0.01
    assert abs(tflop[3] / tflop[0] - (1 + 2 / 8 / 3)) < 0.01


def test_scan_beside_attention() -> None:
    out = run("benchmarks/scan.py", "--tokens", "16", "48", "--width", "24", "--heads", "2", "--repeats", "1")
    rows = re.findall(r"(attention|mamba|scan): tokens (\d+), .* times_attention ([\d.]+)", out)
    assert [(name, tokens) for name, tokens, _ in rows] == [
        (name, tokens) for tokens in ("16", "48") for name in ("attention", "mamba", "scan")
    ]
    assert all(float(ratio) == 1 for name, _, ratio in rows if name == "attention")


def test_skeleton_beside_a_bare_stack() -> None:
    out = run("benchmarks/skeleton.py", "--backbone", "dit_s_8", "--batch", "1", "--rounds", "1", "--device", "cpu")
    assert len(re.findall(r"forward(?: and backward)?, (?:bare stack|dit_s_8): fastest [\d.]+ ms", out)) == 4


def test_skeleton_is_no_slower_than_a_bare_stack() -> None:
    """As committed: within 5 % forward and backward."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "skeleton_cpu.json").read_text())["rows"]
    assert all(row["min_over_bare"] <= 1.05 for row in rows)


def test_scan_costs_at_most_three_times_attention_at_256_tokens() -> None:
    """As committed."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "scan_cpu.json").read_text())["rows"]
    ratios = {(row["name"], row["tokens"]): row["times_attention"] for row in rows}
    assert ratios["mamba", 256] <= 3
    assert {tokens for _, tokens in ratios} == {64, 256, 1024, 4096}


def test_coupling() -> None:
    out = run("benchmarks/coupling.py", "--divide", "32", "--rounds", "1")
    assert len(re.findall(r"pool (?:1792|4096), classes \d+, ms_per_sample [\d.e-]+", out)) == 9, out
    assert len(re.findall("percent_of_step", out)) == 3, "of the digits"


@pytest.mark.slow
def test_quality_of_options_side_by_side(tmp_path: Path) -> None:
    """At equal compute: flow matching, whose targets cost nothing, gets more steps."""
    options = ["--options", "base", "flow_matching", "--seeds", "0", "1", "--steps", "12", "--folder", str(tmp_path)]
    out = run("benchmarks/quality.py", *options, patience=6 * PATIENCE)  # 32,000 samples
    assert [line.split(" |")[0] for line in out.splitlines() if line.startswith("| ")][2:] == [
        "| base",
        "| flow_matching",
    ]
    assert "base, seed 1, 12 steps" in out
    assert "flow_matching, seed 0, 14 steps" in out
    assert json.loads((tmp_path / "base-0" / "config.json").read_text())["data"]["folder"].endswith("digits-half")
