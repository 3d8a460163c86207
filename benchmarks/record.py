"""Dated results with device and versions, as JSON under benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import shortcutflow

RESULTS = Path(__file__).parent / "results"

PEAK_BFLOAT16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by part of the device's name, from the makers' data sheets."""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a known GPU, else None."""
    if device.type != "cuda":
        return None
    return next((peak for part, peak in PEAK_BFLOAT16.items() if part in device_name(device)), None)


def write_result(name: str, device: torch.device, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write one benchmark's rows with everything needed to repeat it."""
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "versions": {
            "shortcutflow": shortcutflow.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "config": config,
        "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
