"""What an evaluation found, as one JSON file and as a table: every number beside all that it takes to repeat it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shortcutflow
from shortcutflow.config import RunConfig
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.metrics import METRICS
from shortcutflow.evaluation.reference import Reference, file_name
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.io.atomic import write_whole
from shortcutflow.models.model import Model


def report_path(folder: Path, protocol: str) -> Path:
    """Where a report goes by default."""
    return folder / f"evaluation-{file_name(protocol)}.json"


def report_of(
    sampler: Sampler,
    protocol: EvaluationProtocol,
    reference: Reference | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    samples: int,
    processes: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The report, as JSON.

    A row is that of a number of "steps": "values" by metric, and "seconds" of all processes by phase; ``seconds`` are
    those of this call on rank 0, the whole and of making the reference.
    """
    model, vae, classes = sampler.model, sampler.autoencoder, sampler.model.num_classes
    facts = _facts_of(model, sampler.seed)
    return facts | {
        "subject": facts["subject"] | model.identity,
        "protocol": {
            "name": protocol.name, "description": protocol.description, "extractor": protocol.extractor.name,
        },
        "reference": reference and reference.record.model_dump() | {"file": reference.file, "reused": reference.reused},
        "metrics": {name: METRICS[name] for name in rows[0]["values"] if name in METRICS},
        "samples": samples,
        "labels": "none" if classes is None else f"in turn: sample i has label i mod {classes}",
        "guidance_scale": sampler.guidance_scale,
        **model.sampler_options(),
        "vae": {"name": vae.name, "sha256": vae.sha256} if vae is not None else None,
        "images": {
            "height": sampler.side[0], "width": sampler.side[1],
            "values": "uint8, rounded from [-1, 1]" if protocol.eight_bit else "as sampled",
        },
        "precision": sampler.precision,
        "batch_size": sampler.batch_size,
        "rows": list(rows),
        "seconds": dict(seconds),
        "processes": processes,
    }  # fmt: skip


def _facts_of(model: Model, seed: int) -> dict[str, Any]:
    """What every report says: which weights, which seed, where and when."""
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    return {
        "format": "shortcutflow-evaluation",
        "subject": {
            "name": model.name, "folder": str(model.folder), "weights": model.weights, "step": model.config.step,
        },
        "seed": seed,
        "device": device,
        "versions": {
            "shortcutflow": shortcutflow.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def finish_report(measured: Mapping[str, Any], model: Model, config: RunConfig) -> dict[str, Any]:
    """What a run's own evaluation found, with what it takes to repeat it; written into the run's folder."""
    settings = config.evaluation
    assert settings is not None
    report = _facts_of(model, config.seed) | {"evaluation": settings.model_dump(mode="json"), **measured}
    write_report(report, report_path(model.folder, getattr(settings, "protocol", settings.kind)))
    return report


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write it, whole or not at all."""
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def table_of(report: Mapping[str, Any]) -> str:
    """The rows as a table, with a line that says how they were measured."""
    reference, protocol = report.get("reference"), report.get("protocol")
    samples = f", {report['samples']} samples" if "samples" in report else ""
    against = f" against {reference['source']}" if reference else ""
    if reference and reference["reused"]:
        against += f", whose statistics were reused from {reference['file']}"
    lines = [f"{report['subject']['name']}, weights {report['subject']['weights']}{samples}{against}"]
    lines += [f"protocol {protocol['name']}: {protocol['description']}"] if protocol else []
    rows = report.get("rows", [])
    widths = {name: max(12, len(name) + 2) for name in (rows[0]["values"] if rows else ())}
    lines.append("steps" + "".join(f"{name:>{width}}" for name, width in widths.items()) + "     seconds")
    for row in rows:
        values = "".join(f"{_short(row['values'][name]):>{width}}" for name, width in widths.items())
        lines.append(f"{row['steps']:5d}{values}{sum(row.get('seconds', {}).values()):12.1f}")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4f}"
