"""Push-T by sampling budget: the policy recipe in the real environment.

    python benchmarks/policy.py                                # runs the recipe; prints the table
    python benchmarks/policy.py --seeds 0 1 2 --write          # writes docs/measured.md and benchmarks/results/
    python benchmarks/policy.py --runs runs/policy_sequences/... --write      # of runs that are finished

Runs are told apart by objective and seed, both of which are in a run's folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import MEASURED, put_into_page, write_result
from shortcutflow.config import RunConfig

ROOT = Path(__file__).parent.parent
START, END = "<!-- policy table: benchmarks/policy.py writes it -->", "<!-- end of policy table -->"


def measured(run_dir: Path) -> dict[str, Any]:
    """What a finished run's folder says."""
    report, config = json.loads((run_dir / "evaluation-policy.json").read_text()), RunConfig.load(run_dir)
    settings = config.model_dump(mode="json", exclude={"data": {"folder"}})
    return {
        "objective": config.objective.kind, "seed": config.seed, "config": settings,
        "protocol": report["protocol"]["description"],
        "rows": [{"steps": row["steps"], **row["values"]} for row in report["rows"]],
    }  # fmt: skip


def train(objective: str, seed: int, folder: Path) -> Path:
    """One run of the recipe."""
    run_dir = folder / f"{objective}-{seed}"
    recipe = str(ROOT / "recipes" / "policy_sequences")
    options = [f"seed={seed}", "--objective", objective, "--run-dir", str(run_dir)]
    subprocess.run([sys.executable, recipe, *options], check=True, cwd=folder)
    return run_dir


def markdown_table(result: dict[str, Any]) -> str:
    """A row a run and budget; several seeds of an objective as mean and range."""
    lines = ["| trained by | network calls a decision | score | solved |", "| --- | ---: | ---: | ---: |"]
    by_objective: dict[str, list[dict[str, Any]]] = {}
    for run in result["rows"]:
        by_objective.setdefault(run["objective"], []).append(run)
    for objective, runs in by_objective.items():
        for i, row in enumerate(runs[0]["rows"]):
            scores, solved = ([run["rows"][i][key] for run in runs] for key in ("score", "solved"))
            spread = f" ({min(scores):.2f} to {max(scores):.2f})" if len(runs) > 1 else ""
            lines.append(
                f"| {objective.replace('_', ' ')} | {row['steps']} | {statistics.mean(scores):.2f}{spread} | "
                f"{statistics.mean(solved):.0%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["shortcut"], choices=["shortcut", "flow_matching"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs, instead of training")
    parser.add_argument("--write", action="store_true", help="write docs/measured.md and benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs or [train(kind, seed, Path(folder)) for kind in args.objectives for seed in args.seeds]
        rows = [measured(run_dir) for run_dir in runs]
    table = markdown_table({"rows": rows})
    print(table)
    if args.write:
        print(write_result("policy", torch.device("cpu"), {"recipe": "policy_sequences"}, rows))
        put_into_page(START, table, END, MEASURED)


if __name__ == "__main__":
    main()
