"""The README's example learns, and the tables of README and docs/measured.md are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import digits, families, finetune, policy, table1
from benchmarks.record import MEASURED
from benchmarks.table1_datasets import DATASETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def measured(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / f"{name}_cpu.json").read_text())
    return result


def test_example_runs_and_learns() -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Net" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 18
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), scope)
    samples = scope["samples"]
    assert isinstance(samples, torch.Tensor)
    assert (samples.mean(0) - torch.tensor([2.0, -1.0])).abs().max() < 0.15
    assert (samples.std(0) - 0.3).abs().max() < 0.15, "noise has 1.0"


def test_readme_is_a_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 110


@pytest.mark.parametrize("benchmark", [digits, families, policy], ids=["digits", "families", "policy"])
def test_table_is_the_measured_one(benchmark: ModuleType) -> None:
    result = measured(benchmark.__name__.rpartition(".")[2])
    assert benchmark.markdown_table(result) in (ROOT / MEASURED).read_text()


def test_readme_has_the_distances_of_the_digits_table() -> None:
    assert digits.markdown_table(measured("digits"), distances_only=True) in README


def test_table_1_is_the_measured_one() -> None:
    assert (
        table1.markdown_table(measured("table1_digits")["rows"], DATASETS["digits"]()) in (ROOT / MEASURED).read_text()
    )


def test_fine_tuning_table_is_the_measured_one() -> None:
    assert finetune.markdown_table(measured("finetune")["rows"]) in (ROOT / finetune.PAGE).read_text()


def test_the_moving_picture_has_a_frame_for_each_number_of_steps() -> None:
    path = ROOT / "docs" / "digits_steps.gif"
    assert path.stat().st_size < 200_000
    with Image.open(path) as picture:
        assert picture.n_frames == len(digits.ANIMATED)
