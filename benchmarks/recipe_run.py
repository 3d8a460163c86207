"""A recipe run to its end in a process of its own: what several benchmarks are made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Trained(NamedTuple):
    """A finished run.

    Attributes:
        folder: of the run.
        seconds: of training.
        rows: of its evaluation, "steps", "seconds" and the metrics; none if the recipe has no evaluation.
    """

    folder: Path
    seconds: float
    rows: list[dict[str, Any]]


def run_recipe(recipe: str, run_dir: Path, overrides: Sequence[str], *, threads: int | None = None) -> Trained:
    """Train a recipe, by its name, with these overrides; what an earlier call left there is resumed, or just read.

    Raises:
        RuntimeError: with the end of what the run said, if it failed.
    """
    finished = run_dir / "finished.json"
    if not finished.exists():
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "shortcutflow", "train", recipe, "--run-dir", str(run_dir), *overrides]
        command += ["--resume"] * (run_dir / "config.json").exists()
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        finished.write_text(json.dumps({"seconds": float(done.stdout.split("trained in ")[1].split()[0])}))
    rows = [
        {"steps": row["steps"], **row["values"], "seconds": sum(row["seconds"].values())}
        for report in run_dir.glob("evaluation-*.json")
        for row in json.loads(report.read_text())["rows"]
    ]
    return Trained(run_dir, json.loads(finished.read_text())["seconds"], rows)
