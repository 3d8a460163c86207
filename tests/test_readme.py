"""The README's example runs, its commands exist, and its table is the one that was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import digits, families, finetune, policy, table1
from benchmarks.table1_datasets import DATASETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", re.findall(r"`?((?:docs|benchmarks|recipes|tests|shortcutflow)/[\w./]+\w)`?", README))
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize("benchmark", [digits, families, policy], ids=["digits", "families", "policy"])
def test_table_is_the_measured_one(benchmark: ModuleType) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())
    assert benchmark.markdown_table(result) in README


def test_table_1_is_the_measured_one() -> None:
    result = json.loads((ROOT / "benchmarks/results/table1_digits_cpu.json").read_text())
    assert table1.markdown_table(result["rows"], DATASETS["digits"]()) in README


def test_fine_tuning_table_is_the_measured_one() -> None:
    result = json.loads((ROOT / "benchmarks/results/finetune_cpu.json").read_text())
    assert finetune.markdown_table(result["rows"]) in (ROOT / finetune.PAGE).read_text()
