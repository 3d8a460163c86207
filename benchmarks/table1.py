"""The paper's table 1 at a size that runs anywhere: every objective, one network, equal training compute, three seeds.

    make table1                                            # on handwritten digits, on two CPU cores
    python benchmarks/table1.py --jobs 2 --write           # and writes docs/measured.md, a plot and benchmarks/results/
    python benchmarks/table1.py --dataset cifar10 --jobs 1 --folder runs/table1 --write       # on a GPU

Compute is counted in forward passes of a sample: a training step costs 3 a sample (forward, and backward as two) and
what the objective's targets cost (``target_evaluations``). Every row has the same sum. Methods of two phases pay for
their teacher, a run of flow matching that gets half of it; a seed's three methods share one teacher and each is charged
for it. Runs that ``--folder`` holds already are not repeated, so that a stopped table goes on; rows of methods that are
not asked for stay as they were recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.compute import evaluations_a_step
from benchmarks.recipe_run import ROOT, Trained, run_recipe
from benchmarks.record import MEASURED, RESULTS, put_into_page, write_result
from benchmarks.table1_datasets import BUDGETS, DATASETS, Dataset
from benchmarks.table1_paper import PAPER
from shortcutflow.config import with_overrides

START, END = "<!-- table 1: benchmarks/table1.py writes it -->", "<!-- end of table 1 -->"
TEACHERS_SHARE = 0.5
"""Of the compute of a method of two phases."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as the paper has it, or a later one.
        kind: of the objective.
        two_phase: whether it learns from a trained flow.
        settings: overrides of the objective's fields.
    """

    name: str
    kind: str
    two_phase: bool = False
    settings: tuple[str, ...] = ()


METHODS = (
    Method("Progressive distillation", "progressive_distillation", True, ("objective.finest_steps=16",)),
    Method("Consistency distillation", "consistency_distillation", True, ("objective.finest_steps=32",)),
    Method("Reflow", "reflow", True, ("objective.teacher_steps=16", "objective.rows_per_pair=4")),
    Method("Flow matching", "flow_matching"),
    Method("Consistency training", "consistency_training"),
    Method("Live reflow", "live_reflow"),
    Method("Shortcut", "shortcut"),
    Method("SplitMeanFlow", "split_mean_flow", settings=("target_weights=current",)),
    Method("alpha-Flow", "alpha_flow", settings=("target_weights=current",)),
    Method("SoFlow", "soflow", settings=("target_weights=current",)),
    Method("MeanFlow", "mean_flow", settings=("target_weights=current",)),
    Method("Lagrangian", "lagrangian", settings=("target_weights=current",)),
)
"""Settings that are not the default did better on digits in one step, on a seed that is not in the table (100):
progressive distillation with M = 16 for 128 (0.44 for 0.45, and nearer at more steps), consistency distillation with
M = 32 for 128 (0.43 for 1.39). Consistency training did better with its default of 128 (0.37) than with 32 (0.46). The
shortcut model keeps the recipe's settings: with M = 32 and half of the rows bootstrapped it did better in one step
(0.48 for 0.56) and worse in 128 (0.29 for 0.19). Methods after the paper make their targets by the current weights, as
their papers do, and nothing was tuned for them."""


def overrides_of(method: Method, dataset: Dataset, evaluations: float, seed: int, teacher: Path | None) -> list[str]:
    """What turns the recipe into this run of the table: the last one says how many steps cost so many evaluations."""
    chosen = [*dataset.overrides, f"seed={seed}", f"objective.kind={method.kind}", *method.settings]
    chosen += [f"teacher={teacher.absolute()}"] if teacher is not None else []
    steps = round(evaluations / evaluations_a_step(with_overrides(dataset.config, chosen)))
    return [*chosen, f"training.steps={steps}"]


def train_teacher(dataset: Dataset, seed: int, folder: Path, threads: int | None) -> Trained:
    """The flow that methods of two phases learn from, for its share of the compute."""
    evaluations = TEACHERS_SHARE * evaluations_of(dataset)
    overrides = overrides_of(Method("Teacher", "flow_matching"), dataset, evaluations, seed, None)
    return run_recipe(dataset.recipe, folder / f"teacher-{seed}", overrides, threads=threads)


def evaluations_of(dataset: Dataset) -> float:
    """What each row of the table costs: the recipe's own steps with its own objective."""
    config = with_overrides(dataset.config, dataset.overrides)
    return config.training.steps * evaluations_a_step(config)


def train(method: Method, dataset: Dataset, seed: int, folder: Path, threads: int | None) -> dict[str, Any]:
    """One run of the table: its steps, its seconds, its quality by budget."""
    evaluations, teacher = evaluations_of(dataset), None
    if method.two_phase:
        # Made before by :func:`train_teacher`, and only read here.
        teacher = train_teacher(dataset, seed, folder, threads)
        evaluations *= 1 - TEACHERS_SHARE
    overrides = overrides_of(method, dataset, evaluations, seed, teacher.folder if teacher else None)
    trained = run_recipe(dataset.recipe, folder / f"{method.kind}-{seed}", overrides, threads=threads)
    quality = dataset.quality(trained)
    told = ", ".join(f"{budget}: {quality[str(budget)]['distance']:.2f}" for budget in BUDGETS)
    print(f"{method.name}, seed {seed}: {told}", flush=True)
    return {
        "seed": seed, "steps": int(overrides[-1].partition("=")[2]), "training_seconds": trained.seconds,
        "teacher_seconds": teacher.seconds if teacher else 0.0, "quality": quality,
    }  # fmt: skip


def run_table(
    dataset: Dataset, methods: list[Method], seeds: list[int], folder: Path, jobs: int
) -> list[dict[str, Any]]:
    """Every run of the table, ``jobs`` at a time; a row a method."""
    threads = max(1, torch.get_num_threads() // jobs) if jobs > 1 else None
    with ThreadPoolExecutor(jobs) as pool:
        if any(method.two_phase for method in methods):
            list(pool.map(lambda seed: train_teacher(dataset, seed, folder, threads), seeds))
        runs = {
            method.name: [pool.submit(train, method, dataset, seed, folder, threads) for seed in seeds]
            for method in methods
        }
        return [
            {"method": method.name, "kind": method.kind, "two_phase": method.two_phase, "settings": method.settings}
            | {"runs": [run.result() for run in runs[method.name]]}
            for method in methods
        ]  # fmt: skip


def markdown_table(rows: list[dict[str, Any]], dataset: Dataset) -> str:
    """In the paper's form, and the methods after it: mean and range over seeds, and the paper's own numbers."""
    ours = [f"{budget} step{'s' * (budget > 1)}" for budget in BUDGETS]
    titles = ["", *ours, *(["read, 1 step"] if dataset.reads else []), "CelebA-HQ 128 / 4 / 1", "ImageNet 128 / 4 / 1"]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for heading in ("*Two phases*", "*One phase*", "*After the paper*"):
        group = [row for row in rows if group_of(row) == heading]
        if group:
            lines.append(f"| {heading} |" + " |" * (len(titles) - 1))
        for row in group:
            cells = [row["method"]]
            for budget in BUDGETS:
                distances = [run["quality"][str(budget)]["distance"] for run in row["runs"]]
                cells.append(f"{statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f})")
            if dataset.reads:
                cells.append(f"{statistics.mean(run['quality']['1']['read'] for run in row['runs']):.1%}")
            cells += [" / ".join(published.cells()) for published in PAPER.get(row["method"], ())] or ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def group_of(row: dict[str, Any]) -> str:
    """The heading that a row stands under."""
    if row["method"] not in PAPER:
        return "*After the paper*"
    return "*Two phases*" if row["two_phase"] else "*One phase*"


def plot(rows: list[dict[str, Any]], dataset: Dataset, path: Path) -> None:
    """Distance against the number of steps, a line a method; bars from the best seed to the worst."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for row in rows:
        values = [[run["quality"][str(budget)]["distance"] for run in row["runs"]] for budget in BUDGETS]
        means = [statistics.mean(each) for each in values]
        spread = [[m - min(v) for m, v in zip(means, values, strict=True)],
                  [max(v) - m for m, v in zip(means, values, strict=True)]]  # fmt: skip
        style = {"*Two phases*": "--", "*One phase*": "-", "*After the paper*": ":"}[group_of(row)]
        axes.errorbar(BUDGETS, means, yerr=spread, fmt=f"o{style}", capsize=3, label=row["method"])
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel=dataset.metric, title=dataset.title)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(DATASETS), default="digits")
    parser.add_argument("--methods", nargs="+", choices=[m.kind for m in METHODS], default=[m.kind for m in METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--folder", type=Path, help="where runs are kept. [default: a temporary one]")
    parser.add_argument("--write", action="store_true", help="write docs/measured.md, its plot and benchmarks/results/")
    args = parser.parse_args()
    dataset = DATASETS[args.dataset]()
    methods = [method for method in METHODS if method.kind in args.methods]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        rows = run_table(dataset, methods, args.seeds, folder, args.jobs)
    recorded = RESULTS / f"table1_{args.dataset}_{dataset.device.type}.json"
    if args.write and recorded.exists():
        others = {row["kind"]: row for row in json.loads(recorded.read_text())["rows"]}
        made = others | {row["kind"]: row for row in rows}
        rows = [made[method.kind] for method in METHODS if method.kind in made]
    minutes = (time.perf_counter() - start) / 60
    table = markdown_table(rows, dataset)
    print(f"\n{table}\n\n{dataset.metric}; {minutes:.0f} minutes with {args.jobs} runs side by side")
    if args.write:
        config = {"minutes": minutes, "jobs": args.jobs, "teachers_share": TEACHERS_SHARE}
        config |= {"evaluations": evaluations_of(dataset), "metric": dataset.metric}
        print(
            write_result(
                f"table1_{args.dataset}", dataset.device, config | dataset.config.model_dump(mode="json"), rows
            )
        )
        plot(rows, dataset, ROOT / "docs" / f"table1_{args.dataset}.png")
        if args.dataset == "digits":
            put_into_page(START, table, END, MEASURED)


if __name__ == "__main__":
    main()
