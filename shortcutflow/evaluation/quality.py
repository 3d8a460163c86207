"""Curves of quality against the number of sampling steps, from the reports of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from shortcutflow.io.json import read_object, wrong_fields
from shortcutflow.models.config import REPORTS
from shortcutflow.run_dir import find_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
MAX_REPORT_BYTES = 2**24
DISTANCES = {"fid": "FID", "kid": "KID"}
"""Metrics of which lower is better, by the name of their axis."""
DEFAULT_METRICS = (*DISTANCES, "label_accuracy", "score")
"""The first of these that all reports have is drawn if no metric is named."""
WIDE_RANGE = 8
"""A distance whose largest value is so many times its smallest has a logarithmic axis."""


def find_report(path: Path, *, protocol: str | None = None) -> Path:
    """The report of a run.

    Args:
        path: the file itself, a run's or a model's folder, or a folder of runs (the newest is taken).
        protocol: which of several reports: ``evaluation-PROTOCOL.json``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several and none was named.
    """
    if path.is_file():
        return path
    pattern = REPORTS if protocol is None else f"evaluation-{protocol}.json"
    folder = path if any(path.glob(REPORTS)) else find_run(path)
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder} holds no {pattern}: measure the run first, with shortcutflow evaluate")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several reports, {names}: name the file, or its protocol with --protocol")
    return found[0]


class _Row(BaseModel):
    steps: int = Field(ge=1, strict=True)
    values: dict[str, Any]


class _Rows(BaseModel):
    rows: list[_Row] = Field(min_length=1)


def read_report(file: Path) -> dict[str, Any]:
    """Read a report, an object with ``rows``, the ``values`` for each number of ``steps``; ValueError if it is none."""
    report = read_object(file, "an evaluation", longest=MAX_REPORT_BYTES)
    try:
        _Rows.model_validate(report)
    except ValidationError as error:
        raise ValueError(f"{file} is not the report of an evaluation ({wrong_fields(error)}): evaluate again") from None
    return report


def curves_of(report: dict[str, Any]) -> dict[str, dict[int, float]]:
    """A report's values by metric and number of steps; those that are not finite numbers are left out."""
    curves: dict[str, dict[int, float]] = {}
    for row in sorted(report["rows"], key=lambda row: row["steps"]):
        for name, value in row["values"].items():
            if type(value) in (int, float) and math.isfinite(value):
                curves.setdefault(name, {})[row["steps"]] = value
    return curves


def draw_quality(files: Sequence[Path], *, metric: str | None = None) -> Figure:
    """Draw a metric of several runs against the number of steps, a curve for each report.

    Args:
        files: the reports, all measured alike.
        metric: which; None takes the first usual one that all have.

    Raises:
        ValueError: for no reports, reports that were not measured alike, or a metric that one does not have.
        ImportError: without matplotlib.
    """
    if not files:
        raise ValueError("nothing to draw: give at least one run")
    reports = [read_report(file) for file in files]
    facts = [_facts(report) for report in reports]
    for file, other in zip(files, facts, strict=True):
        if other != facts[0]:
            one, two = (", ".join(f"{name} {of[name]}" for name in of if of[name]) for of in (facts[0], other))
            raise ValueError(
                f"values that were not measured alike cannot be compared: {files[0]} by {one}; {file} by {two}. "
                "Evaluate both alike"
            )
    curves = [curves_of(report) for report in reports]
    shared = [name for name in curves[0] if all(name in curve for curve in curves)]
    if metric is None:
        metric = next((name for name in DEFAULT_METRICS if name in shared), None)
    if metric is None:
        raise ValueError(f"name what to draw with --metric; these reports all have: {', '.join(shared) or 'nothing'}")
    if lacking := [file for file, curve in zip(files, curves, strict=True) if metric not in curve]:
        raise ValueError(f"{lacking[0]} has no metric {metric!r}; all reports have: {', '.join(shared) or 'none'}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError("curves are drawn by matplotlib: pip install 'shortcutflow[plot]'") from error
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = [file.absolute().parent.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file.absolute().with_suffix("")) for file in files]
    for name, curve in zip(names, curves, strict=True):
        axes.plot(list(curve[metric]), list(curve[metric].values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({steps for curve in curves for steps in curve[metric]}), minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    values = [value for curve in curves for value in curve[metric].values()]
    if metric in DISTANCES and min(values) > 0 and max(values) > WIDE_RANGE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(f"{DISTANCES[metric]} (lower is better)" if metric in DISTANCES else metric.replace("_", " "))
    axes.grid(visible=True, alpha=0.4)
    # Names may hold dollars, which matplotlib would read as mathematics.
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    title = str(facts[0]["protocol"]) + (f", {facts[0]['samples']} samples" if facts[0]["samples"] else "")
    axes.set_title(title[:160], fontsize=8, parse_math=False, wrap=True)
    return figure


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for values of two reports to be comparable; None where a report does not say."""
    protocol, reference = (
        part if isinstance(part := report.get(name), dict) else {} for name in ("protocol", "reference")
    )
    return {
        "protocol": protocol.get("name"),
        "extractor": protocol.get("extractor"),
        "reference statistics": reference.get("statistics_sha256"),
        "samples": report.get("samples"),
    }
