"""Dated results with device and versions, as JSON under benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import shortcutflow

RESULTS = Path(__file__).parent / "results"
MEASURED = "docs/measured.md"
"""The page of the tables that belong to no other page."""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def described(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a result was made by."""
    versions = {
        "shortcutflow": shortcutflow.__version__, "torch": torch.__version__, "python": platform.python_version()
    }  # fmt: skip
    return {"device": device_name(device), "versions": versions}


def write_result(name: str, device: torch.device, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write one benchmark's rows with everything needed to repeat it."""
    head = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), **described(device)}
    result = head | {"config": config, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line a row: its name and its numbers."""
    for row in rows:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))
        print(f"  {row['name']}: {numbers}")


def put_into_page(start: str, table: str, end: str, page: str) -> None:
    """Replace what stands between two markers of a page, by its path in the checkout."""
    path = RESULTS.parent.parent / page
    text, count = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}",
        lambda _: f"{start}\n{table}\n{end}",
        path.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{path} lacks the markers {start!r} and {end!r}")
    path.write_text(text)


def seconds_in_turn(
    runs: Mapping[str, Callable[[], None]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Wall seconds of each of several functions, called in turn so that all of them meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warm_up + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds
