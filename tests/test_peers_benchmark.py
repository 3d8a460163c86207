"""benchmarks/peers.py beside a stand-in for a checkout: modules with the plain names that SiT's have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import Round, row

ROOT = Path(__file__).parent.parent
MODELS = """
import torch

class SiT(torch.nn.Module):
    def __init__(self, *, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes):
        super().__init__()
        self.layer = torch.nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x, t, y):
        return self.layer(x)

print("others print what they like")
"""
TRANSPORT = """
import time

class Path:
    def training_losses(self, model, x, given):
        time.sleep(0.3)
        return {"loss": (model(x, x[:, 0, 0, 0], **given) - x).square().mean((1, 2, 3))}

def create_transport():
    return Path()

class Sampler:
    def __init__(self, path):
        pass

    def sample_ode(self, *, sampling_method, num_steps):
        assert sampling_method == "euler"

        def run(x, model, **given):
            for _ in range(num_steps - 1):
                time.sleep(0.1)
                x = x + model(x, x[:, 0, 0, 0], **given)

        return run
"""


@pytest.mark.slow
def test_a_checkout_that_waits_is_that_much_slower(tmp_path: Path) -> None:
    """Its training waits for 0.3 s, a step of its sampler for 0.1 s; this library's tiny network takes less."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "transport").mkdir()
    (tmp_path / "transport" / "__init__.py").write_text(TRANSPORT)
    sizes = {"size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 2, "batch": 2, "threads": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "benchmarks/peers.py", "--sit", str(tmp_path), "--rounds", "2", "--device", "cpu"]
    out = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = r"sit, ([a-z]+(?: \d)?): ours_ms ([\d.e+]+), peer_ms ([\d.e+]+), times_faster ([\d.e+]+)"
    found = {work: tuple(map(float, rest)) for work, *rest in re.findall(pattern, out)}
    assert found.keys() == {"training", "sampling 1", "sampling 4"}, out
    assert found["training"][1] >= 300
    assert found["sampling 1"][1] >= 100
    assert found["sampling 4"][1] >= 400


def test_ratios_are_taken_round_by_round() -> None:
    """A disturbance that slows both down by half, and one that slows one of them."""
    rounds = [Round(1.0, 2.0), Round(2.0, 4.0), Round(1.0, 3.0)]
    found = row("sit", "training", rounds)
    assert (found["ours_ms"], found["peer_ms"]) == (1000, 3000)
    assert found["times_faster"] == 2.0
    assert found["times_faster_at_best"] == 2.0
