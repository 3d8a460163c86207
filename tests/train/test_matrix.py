"""Objective x backbone x parallelism x compilation x precision: each passes, or is refused with a sentence."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from shortcutflow.train.loggers import read_metrics
from tests.backbones_contract.cases import TINY
from tests.train.launched import Job, Outcome, outcomes, tiny

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "shortcut": (),
    "flow_matching": ("objective.kind=flow_matching",),
    "released": ("objective.rows=released", "objective.clip=4"),
}
BACKBONES = [
    name for name in ("dit", "lstm", "mamba", "unet", "transformer")
    if TINY[name].requires is None or importlib.util.find_spec(TINY[name].requires or "")
]  # fmt: skip
PARALLEL: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "one": (None, ()),
    "ddp": (2, ("training.parallel=ddp",)),
    "fsdp": (2, ("training.parallel=fsdp",)),
}
PRECISIONS = "float32", "bfloat16"
Cell = tuple[str, str, str, bool, str]
CELLS: list[Cell] = list(itertools.product(OBJECTIVES, BACKBONES, PARALLEL, (False, True), PRECISIONS))
PAIRWISE = [cell for i, cell in enumerate(cell for cell in CELLS if not cell[3]) if i % 7 == 0]
"""A few without compilation, for every day; a stride of 7 meets every value of each of the others."""


def job_of(cell: Cell, folder: Path, shards: Path) -> Job:
    objective, backbone, parallel, compiled, precision = cell
    options = json.dumps(TINY[backbone].options)
    config = tiny(
        shards, "training.steps=2", f"backbone.name={backbone}", f"backbone.options={options}",
        f"training.compile={json.dumps(compiled)}", f"training.precision={precision}",
        *OBJECTIVES[objective], *PARALLEL[parallel][1],
    )  # fmt: skip
    return Job.of(config, folder / "-".join(map(str, cell)))


def problem_of(job: Job, ranks: Sequence[Outcome]) -> str | None:
    """What is wrong with a cell; None if it passed or was refused in words."""
    if {rank.error for rank in ranks} == {"ValueError"}:
        said = {rank.message for rank in ranks}
        return None if len(said) == 1 and "\n" not in said.pop() else "refused with more than a sentence"
    if any(rank.error for rank in ranks):
        return "; ".join(f"{rank.error}: {rank.message[:300]}" for rank in ranks)
    losses = [line["loss"] for line in read_metrics(Path(job.run_dir) / "metrics.jsonl")]
    return None if len(losses) == 2 and all(math.isfinite(loss) for loss in losses) else f"losses {losses}"


def problems(cells: Sequence[Cell], folder: Path, shards: Path) -> list[str]:
    """Of all cells, with a launch for each number of processes."""
    found = []
    for processes in (None, 2):
        chosen = [cell for cell in cells if PARALLEL[cell[2]][0] == processes]
        jobs = [job_of(cell, folder, shards) for cell in chosen]
        # Compilation takes minutes on two cores.
        done = outcomes(jobs, folder / f"launch {processes}", processes=processes, patience=1800)
        for job, ranks in zip(jobs, done, strict=True):
            problem = problem_of(job, ranks)
            found += [f"{Path(job.run_dir).name}: {problem}"] if problem else []
    return found


def test_some_combinations(tmp_path: Path, shards: Path) -> None:
    values = [set(column) for column in zip(*PAIRWISE, strict=True)]
    assert values == [set(OBJECTIVES), set(BACKBONES), set(PARALLEL), {False}, set(PRECISIONS)]
    assert problems(PAIRWISE, tmp_path, shards) == []


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_all_combinations(tmp_path: Path, shards: Path, backbone: str, compiled: bool) -> None:
    cells = [cell for cell in CELLS if cell[1] == backbone and cell[3] == compiled]
    assert len(cells) == 3 * 3 * 2
    assert problems(cells, tmp_path, shards) == []
