"""``import shortcutflow`` is light: no heavy package, and at most a fifth of torch's own import time."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ["webdataset", "tensorboard", "cleanfid", "diffusers", "typer", "torchvision", "sklearn", "PIL", "tqdm"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_loads_nothing_heavy() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import shortcutflow, backbones
print(sorted(name for name in {HEAVY} if name in set(sys.modules) - before))
"""
    assert run(code) == "[]"


def test_import_time() -> None:
    code = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import shortcutflow
print((time.perf_counter() - middle) / (middle - start))
"""
    # As a fraction of torch's own import, the smallest of up to ten, so that the speed of the machine does not matter.
    assert any(float(run(code)) <= 0.2 for _ in range(10))
