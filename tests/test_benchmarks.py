"""The benchmark commands run, at toy size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*argv: str) -> str:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_train_step_of_digits_beside_another_command() -> None:
    other = f"{sys.executable} -c \"print('compiling'); print('{{\\\"ms_median\\\": 1000}}')\""
    out = run("benchmarks/train_step.py", "digits", "--steps", "3", "--rounds", "1", "--reference-command", other)
    ours = re.search(r"ours, eager: ms_median ([\d.]+), ms_min [\d.]+, times_faster ([\d.]+)", out)
    assert ours, out
    ms, ratio = map(float, ours.groups())
    assert abs(ms * ratio / 1000 - 1) < 0.01
    assert "released code, this run: ms_median 1000" in out


def test_train_step_of_a_dit() -> None:
    options = ["--backbone", "dit_s_8", "--batch", "8", "--steps", "1", "--no-compile", "--device", "cpu"]
    out = run("benchmarks/train_step.py", "dit", *options)
    tflop = [float(value) for value in re.findall(r"tflop_per_step ([\d.]+)", out)]
    assert len(tflop) == 4, out
    # Two more forwards on k of the rows, where training costs three: a sixth more at k = 1/4, a twelfth at 1/8.
    assert abs(tflop[1] / tflop[0] - (1 + 2 / 4 / 3)) < 0.01
    assert abs(tflop[3] / tflop[0] - (1 + 2 / 8 / 3)) < 0.01
