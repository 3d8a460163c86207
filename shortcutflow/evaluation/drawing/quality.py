"""Reports of evaluations, read for drawing: what was measured at which number of steps, and by which protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcutflow.evaluation.runs import REPORT_FILE
from shortcutflow.io.json import read_object
from shortcutflow.run_dir import find_run

LONGEST_REPORT = 2**24
"""Bytes of a report that are read."""
USUAL = ("fid", "frechet", "frechet_distance", "kid", "score", "read_correctly")
"""Which metric is drawn if none is named: the first of these that there is."""
COMPARED = ("extractor", "reference_statistics_sha256", "samples")
"""What must be the same, beside the protocol, for values to be comparable, where reports say it."""


@dataclass(frozen=True)
class Report:
    """One run, measured.

    Attributes:
        file: where it was read.
        protocol: the protocol's name, or what the report says of it.
        details: further facts on which values depend, by name.
        values: by metric and number of steps.
    """

    file: Path
    protocol: str
    details: dict[str, str]
    values: dict[str, dict[int, float]]

    @property
    def measured(self) -> str:
        """How, in words."""
        return ", ".join([repr(self.protocol), *(f"{name} {value}" for name, value in self.details.items())])


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
    pattern = f"evaluation-{protocol}.json" if protocol is not None else f"{Path(REPORT_FILE).stem}*.json"
    folder = path if any(path.glob(f"{Path(REPORT_FILE).stem}*.json")) else find_run(path)
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder} holds no {pattern}: measure the run first, with shortcutflow evaluate")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several reports, {names}: name the file, or its protocol with --protocol")
    return found[0]


def read_report(file: Path) -> Report:
    """Read a report, whoever wrote it.

    It is an object with ``rows``, a list with an object a sampling budget: ``steps`` and any numbers. ``protocol`` is a
    text or an object with a ``name``. A metric may be an object with a ``mean``, and may lie in a ``values`` or
    ``metrics`` of its row; anything that is no number is passed over.

    Raises:
        ValueError: if it is no such report.
    """
    found = read_object(file, "an evaluation", longest=LONGEST_REPORT)
    rows = found.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} is no report of an evaluation: it must have rows, an object a number of steps")
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        steps = row.get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"{file}: each of its rows must have steps, a number from 1 on; got {steps!r}")
        for name, value in _numbers(row).items():
            values.setdefault(name, {})[steps] = value
    protocol = found.get("protocol", "unknown")
    facts = _facts(found)
    name = str(protocol.get("name", "unknown")) if isinstance(protocol, dict) else str(protocol)
    return Report(file, name, {key: facts[key] for key in COMPARED if key in facts}, values)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a row."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict) and name in ("values", "metrics"):
            numbers |= _numbers(value)
            continue
        value = value.get("mean") if isinstance(value, dict) else value
        if name != "steps" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[name] = float(value)
    return numbers


def _facts(report: dict[str, Any]) -> dict[str, str]:
    """What it says of how was measured, of one level: ``{"reference": {"hash": ...}}`` is reference_hash."""
    facts: dict[str, str] = {}
    for part in (report, report.get("settings"), report.get("protocol")):
        for name, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, str | int | float):
                facts[name] = str(value)
            elif isinstance(value, dict):
                facts |= {f"{name}_{key}": str(v) for key, v in value.items() if isinstance(v, str | int | float)}
    return facts


def check_comparable(reports: Sequence[Report]) -> None:
    """Raise ValueError, naming both, if two reports were not measured alike."""
    first = reports[0]
    for other in reports[1:]:
        shared = first.details.keys() & other.details.keys()
        if first.protocol != other.protocol or any(first.details[name] != other.details[name] for name in shared):
            raise ValueError(
                f"values of different protocols cannot be compared: {first.file} was measured by {first.measured}; "
                f"{other.file} by {other.measured}. Evaluate both alike"
            )


def metric_of(reports: Sequence[Report], metric: str | None) -> str:
    """The metric to draw: the one asked for, or the first usual one that all have.

    Raises:
        ValueError: if a report does not have it, naming those that all have.
    """
    shared = [name for name in reports[0].values if all(name in report.values for report in reports)]
    if metric is None:
        usual = [name for name in USUAL if name in shared]
        if not usual:
            raise ValueError(
                f"name what to draw with --metric; these reports all have: {', '.join(shared) or 'nothing'}"
            )
        return usual[0]
    for report in reports:
        if metric not in report.values:
            raise ValueError(f"{report.file} has no metric {metric!r}; all reports have: {', '.join(shared) or 'none'}")
    return metric
