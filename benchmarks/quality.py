"""What one option or objective changes in the samples, all else equal: network, data, seeds and training compute.

    python benchmarks/quality.py                                      # digits, half of them held out
    python benchmarks/quality.py --setting cifar16 --options base best --data cifar10_train.zip
    python benchmarks/quality.py --options base best --write          # docs/quality_digits.md, benchmarks/results/

Each row of ``OPTIONS`` is the recipe with some overrides, trained for as many steps as cost what the base costs:
forward passes of a sample are counted, 3 for the gradient and those of the targets. Distances are Fréchet distances of
2,000 samples, to the pictures that the network was trained on and to pictures that were held out. "Nearer to training"
is the share of one-step samples whose nearest real picture is one of training: one half where both sets are as large,
more where a network copies. p is Welch's t-test of the one-step distances against the base's (Holm's correction is
left to the reader, who knows which rows matter). Runs that ``--folder`` holds already are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.compute import evaluations_a_step
from benchmarks.quality_settings import SETTINGS, Setting
from benchmarks.recipe_run import ROOT, run_recipe
from benchmarks.record import write_result
from shortcutflow.config import with_overrides

CURRENT = "target_weights=current"
COARSE = ("objective.finest_steps=32", "objective.time_steps=128")
WEIGHT = "objective.bootstrap_weight=8"
COUPLING = "coupling.kind=transport"
BFLOAT16 = "training.precision=bfloat16"

BEST = (CURRENT, *COARSE, WEIGHT, COUPLING)
DATA = ("backbone.prediction=data", "objective.time_weight=ramp")

OPTIONS: dict[str, tuple[str, ...]] = {
    "base": (),
    "flow_matching": ("objective.kind=flow_matching",),
    "current": (CURRENT,),
    "weight": (WEIGHT,),
    "coarse": COARSE,
    "coupling": (COUPLING,),
    "uncoupled": (CURRENT, *COARSE, WEIGHT),
    "best": BEST,
    "best, weight 4": (CURRENT, *COARSE, "objective.bootstrap_weight=4", COUPLING),
    "best, M = 128": (CURRENT, WEIGHT, COUPLING),
    "best, targets by the EMA": (*COARSE, WEIGHT, COUPLING),
    "best, guidance as an input": (
        "objective.kind=guided_shortcut",
        "backbone.options.guidance_input=true",
        *BEST,
    ),
    "ramped share": (
        CURRENT,
        *COARSE,
        COUPLING,
        "objective.first_bootstrap_fraction=0.1",
        "objective.bootstrap_fraction=0.5",
    ),
    "plug-in": (CURRENT, "objective.plug_in_groups=1"),
    "uncoupled, plug-in": (CURRENT, *COARSE, WEIGHT, "objective.plug_in_groups=1"),
    "data prediction": DATA,
    "best, data prediction": (*BEST, *DATA),
    "wavelet": (*BEST, "objective.wavelet_weights=[1,1,1,2]"),
    "wavelet, high": (*BEST, "objective.wavelet_weights=[1,1,2,4]"),
    "wavelet, low": (*BEST, "objective.wavelet_weights=[4,2,1,1]"),
    "adaptive": (CURRENT, *COARSE, "objective.adaptive_power=0.5"),
    "split_mean_flow": ("objective.kind=split_mean_flow", CURRENT),
    "split_mean_flow, middle": ("objective.kind=split_mean_flow", "objective.split=middle", CURRENT),
    "alpha_flow": ("objective.kind=alpha_flow", CURRENT),
    "soflow": ("objective.kind=soflow", CURRENT),
    "mean_flow": ("objective.kind=mean_flow", CURRENT),
    "lagrangian": ("objective.kind=lagrangian", CURRENT),
    "consistency_training": ("objective.kind=consistency_training",),
    "bfloat16": (BFLOAT16,),
    "bfloat16, rounded residual": (BFLOAT16, "backbone.options.round_residual=true"),
}
"""By name, the overrides of the recipe ``digits_paper``, which is the base: the paper's shortcut model."""


def train_and_measure(name: str, setting: Setting, seed: int, folder: Path, threads: int | None) -> dict[str, Any]:
    """One run: its steps, its seconds, and what its samples measure, by number of steps."""
    common = [*setting.overrides, f"seed={seed}", "evaluation=null", "training.checkpoint_every=0"]
    config = setting.recipe()
    evaluations = setting.steps * evaluations_a_step(with_overrides(config, common))
    chosen = [*common, *OPTIONS[name]]
    steps = round(evaluations / evaluations_a_step(with_overrides(config, chosen)))
    run = run_recipe(
        setting.recipe_name,
        folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}",
        [*chosen, f"training.steps={steps}"],
        threads=threads,
    )
    measured = setting.measure(run.folder)
    shown = ", ".join(f"{count}: {row['train']:.3f} / {row['held_out']:.3f}" for count, row in measured.items())
    print(f"{name}, seed {seed}, {steps} steps, {run.seconds:.0f} s: {shown}", flush=True)
    return {"seed": seed, "steps": steps, "seconds": run.seconds, "quality": measured}


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]], counts: list[int]) -> list[str]:
    """A row of the table: means and ranges over seeds."""

    def values(of: list[dict[str, Any]], count: int, key: str) -> list[float]:
        return [run["quality"][str(count)][key] for run in of]

    cells = []
    for key in ("train", "held_out"):
        for count in counts:
            found = values(runs, count, key)
            spread = f" ({min(found):.2f} to {max(found):.2f})" if count == 1 and len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}")
    cells.append(f"{statistics.mean(values(runs, 1, 'nearer')):.0%}")
    cells.append(f"{statistics.mean(values(runs, 1, 'read')):.1%}" if "read" in runs[0]["quality"]["1"] else "")
    p = ""
    if runs is not base and min(len(runs), len(base)) > 1:
        from scipy.stats import ttest_ind

        found = ttest_ind(values(runs, 1, "held_out"), values(base, 1, "held_out"), equal_var=False)
        p = f"{found.pvalue:.4f}"
    return [*cells, p]


def markdown_table(results: dict[str, list[dict[str, Any]]], counts: list[int]) -> str:
    """A row an option: distances to the training pictures, to held-out ones, copying, labels read, p."""
    titles = ["option", *(f"training, {count}" for count in counts), *(f"held out, {count}" for count in counts)]
    titles += ["nearer to training", "read", "p"]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    base = results.get("base", [])
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(summary(runs, base, counts))} |" for name, runs in results.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="digits")
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=["base", "uncoupled", "best"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of the base. [default: the setting's]")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--data", type=Path, help="of the setting cifar16: a folder or archive of CIFAR-10's pictures")
    parser.add_argument("--folder", type=Path, help="where runs are kept. [default: a temporary one]")
    parser.add_argument("--write", action="store_true", help="write docs/quality_SETTING.md and benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        setting = SETTINGS[args.setting](folder / "data", args.data, args.steps)
        threads = max(1, torch.get_num_threads() // args.jobs) if args.jobs > 1 else None
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = {
                name: [pool.submit(train_and_measure, name, setting, seed, folder, threads) for seed in args.seeds]
                for name in args.options
            }
            results = {name: [run.result() for run in of] for name, of in runs.items()}
    table = markdown_table(results, list(setting.counts))
    print(f"\n{table}\n\n{setting.title}; {setting.steps} steps of the base")
    if args.write:
        rows = [{"option": name, "overrides": OPTIONS[name], "runs": of} for name, of in results.items()]
        config = {"steps": setting.steps, "metric": setting.title} | setting.recipe().model_dump(mode="json")
        print(write_result(f"quality_{args.setting}", torch.device("cpu"), config, rows))
        (ROOT / "docs" / f"quality_{args.setting}.md").write_text(f"{setting.title}.\n\n{table}\n")


if __name__ == "__main__":
    main()
