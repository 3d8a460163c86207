"""The tables that compare objectives: equal compute in every row, the paper's numbers, runs that are not repeated."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import finetune, quality, table1
from benchmarks.compute import evaluations_a_step
from benchmarks.recipe_run import run_recipe
from benchmarks.table1_datasets import BUDGETS, DATASETS
from benchmarks.table1_paper import PAPER
from recipes.digits import paper_recipe as recipe
from shortcutflow import objectives
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.objectives import Objective
from shortcutflow.train.loop import train

TEACHER = Path("/a/teacher")


def config_of(overrides: Iterable[str]) -> RunConfig:
    return with_overrides(recipe(), overrides)


@pytest.mark.parametrize("name", quality.OPTIONS)
def test_every_option_is_a_run(name: str) -> None:
    assert config_of(quality.OPTIONS[name]).training.steps == 2500


def test_every_objective_is_compared() -> None:
    """In table 1, the later ones also among the options of quality.py."""
    classes = [value for value in vars(objectives).values() if isinstance(value, type) and issubclass(value, Objective)]
    kinds = {each.model_fields["kind"].default for each in classes if each is not Objective}
    of_options = (config_of(overrides).objective.kind for overrides in quality.OPTIONS.values())
    # A shortcut model with one more input, which quality.py compares with the best one.
    assert {method.kind for method in table1.METHODS} | {"guided_shortcut"} == kinds >= set(of_options)
    assert {method.name for method in table1.METHODS[:7]} == PAPER.keys()
    assert len(table1.METHODS) == 12


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("method", table1.METHODS, ids=lambda method: method.kind)
def test_every_row_costs_the_same(name: str, method: table1.Method) -> None:
    """Within one step of the longest, teacher included."""
    dataset = DATASETS[name]()
    in_all = table1.evaluations_of(dataset)
    share = 1 - table1.TEACHERS_SHARE if method.two_phase else 1
    overrides = table1.overrides_of(method, dataset, share * in_all, 0, TEACHER if method.two_phase else None)
    config = with_overrides(dataset.config, overrides)
    cost = config.training.steps * evaluations_a_step(config)
    if method.two_phase:
        flow = table1.Method("Teacher", "flow_matching")
        teacher = with_overrides(
            dataset.config, table1.overrides_of(flow, dataset, table1.TEACHERS_SHARE * in_all, 0, None)
        )
        cost += teacher.training.steps * evaluations_a_step(teacher)
    assert cost == pytest.approx(in_all, rel=1e-3)
    assert config.objective.kind == method.kind
    assert config.objective.needs_teacher == method.two_phase


def test_a_step_costs_three_and_its_targets() -> None:
    assert evaluations_a_step(recipe()) == 64 * 3.5
    assert evaluations_a_step(with_overrides(recipe(), ["objective.kind=flow_matching"])) == 64 * 3


@pytest.mark.parametrize("way", finetune.WAYS)
def test_fine_tuning_costs_what_training_from_scratch_does(way: str) -> None:
    overrides = finetune.overrides_of(way, 1000, 0, TEACHER)
    config = with_overrides(recipe(), overrides)
    cost = config.training.steps * evaluations_a_step(config)
    assert cost == pytest.approx(1000 * evaluations_a_step(recipe()), rel=2e-3)
    assert config.start == (None if way == "from scratch" else str(TEACHER))


def rows() -> list[dict[str, Any]]:
    def run(distance: float) -> dict[str, Any]:
        return {"seed": 0, "quality": {str(n): {"distance": distance, "read": 0.5} for n in BUDGETS}}

    return [
        {"method": method.name, "kind": method.kind, "two_phase": method.two_phase, "runs": [run(i), run(i + 1)]}
        for i, method in enumerate(table1.METHODS)
    ]


def test_printed_in_the_papers_form(tmp_path: Path) -> None:
    dataset = DATASETS["digits"]()
    lines = table1.markdown_table(rows(), dataset).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "*Two phases*", "Progressive distillation", "Consistency distillation", "Reflow",
        "*One phase*", "Flow matching", "Consistency training", "Live reflow", "Shortcut",
        "*After the paper*", "SplitMeanFlow", "alpha-Flow", "SoFlow", "MeanFlow", "Lagrangian",
    ]  # fmt: skip
    assert "6.50 (6.00 to 7.00)" in lines[10]
    assert "6.9 / 13.8 / 20.5" in lines[10]
    # What nobody has looked up is marked.
    assert "302.9? / 251.3? / 14.8?" in lines[3]
    table1.plot(rows(), dataset, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "finished.json").write_text(json.dumps({"seconds": 3.5}))
    row = {"steps": 4, "values": {"fid": 1.5}, "seconds": {"sampling": 2.0, "distances": 1.0}}
    (tmp_path / "evaluation-digits.json").write_text(json.dumps({"rows": [row]}))
    trained = run_recipe("no_such_recipe", tmp_path, [])
    assert (trained.seconds, trained.rows) == (3.5, [{"steps": 4, "fid": 1.5, "seconds": 3.0}])


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has no field 'nothing'"):
        run_recipe("digits", tmp_path / "run", ["training.nothing=1"], threads=1)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """Left after 2 of 4 steps by whoever started it."""
    overrides = ["training.steps=4", "training.checkpoint_every=2", "evaluation=null", f"data.folder={tmp_path}/digits"]
    small = with_overrides(recipe(), overrides)
    stopped = small.model_copy(update={"training": small.training.model_copy(update={"steps": 2})})
    train(RunConfig.model_validate(stopped.model_dump()), tmp_path / "run")
    run_recipe("digits", tmp_path / "run", overrides, threads=1)
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()
    assert (tmp_path / "run" / "finished.json").is_file()
