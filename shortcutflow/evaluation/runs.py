"""The report of what was measured when a run ended, in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import shortcutflow
from shortcutflow.io.atomic import write_whole
from shortcutflow.run_dir import Run

REPORT_FILE = "evaluation.json"


def write_report(run: Run, *, protocol: str, rows: Sequence[Any], **measured: object) -> None:
    """Write what was measured into the run's folder, with what is needed to repeat it.

    Args:
        run: what was measured.
        protocol: how, in words.
        rows: a dataclass a sampling budget.
        measured: further findings.
    """
    settings = run.config.evaluation
    report = {
        "protocol": protocol,
        "settings": settings.model_dump() if settings else None,
        "weights": run.weights,
        "step": run.step,
        "seed": run.config.seed,
        **measured,
        "rows": [asdict(row) for row in rows],
        "versions": {"shortcutflow": shortcutflow.__version__, "torch": torch.__version__},
    }
    write_whole(run.folder / REPORT_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
