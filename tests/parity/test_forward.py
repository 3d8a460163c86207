"""The released DiT, forward: outputs, activations and default initialisation as recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backbones
from tests.conftest import GOLDEN
from tests.parity.recorded import Recording, build, flax_names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "forward_file" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("dit_forward_*.npz"))
        metafunc.parametrize("forward_file", files, ids=lambda f: f.stem)


def recorded_call(recording: Recording, device: torch.device) -> tuple[torch.Tensor, ...]:
    x, t, level, y = recording.images("x"), recording.tensor("t"), recording.tensor("dt"), recording.tensor("y")
    return x.to(device), t.to(device), torch.exp2(-level.float()).to(device), y.long().to(device)


@pytest.mark.parametrize("variant", ["f32", "f32_ignore_dt"])
def test_output(forward_file: Path, variant: str, device: torch.device) -> None:
    z = Recording.open(forward_file)
    net = build(z.json("config"), z.params(), ignore_step_size=variant.endswith("ignore_dt")).to(device)
    with torch.no_grad():
        out = net(*recorded_call(z, device)).cpu()
    assert (out - z.images(f"{variant}/out")).abs().max() < 1e-5


def test_activations(forward_file: Path, device: torch.device) -> None:
    z = Recording.open(forward_file)
    net = build(z.json("config"), z.params()).to(device)
    seen: dict[str, torch.Tensor] = {}
    named: dict[str, nn.Module] = {
        "patch_embed": net.patch_embedding,
        "time_embed": net.condition.time,
        "dt_embed": net.condition.step,
        "final_layer": net.head,
    }
    named |= {f"dit_block_{i}": block for i, block in enumerate(net.blocks)}
    for name, module in named.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.detach().cpu()))
    x, t, d, y = recorded_call(z, device)
    with torch.no_grad():
        net(x, t, d, y)
        seen["conditioning"] = net.condition(t, d, y).cpu()
    for name, value in seen.items():
        expected = z.tensor(f"f32/activations/{name}").reshape(value.shape)
        assert (value - expected).abs().max() < 1e-5, name
    positions = z.tensor("f32/activations/pos_embed").reshape(-1, net.positions.shape[-1])[: len(net.positions)]
    assert (net.positions.cpu() - positions).abs().max() < 1e-5
    index = (256 * t.cpu()).floor().long()
    assert (100 * net.log_variances.detach().cpu()[index] - z.tensor("f32/logvars")).abs().max() < 1e-5


def test_bfloat16(forward_file: Path, device: torch.device) -> None:
    z = Recording.open(forward_file)
    net = build(z.json("config"), z.params()).to(device)
    conditions = []
    net.condition.time.register_forward_hook(lambda _m, _i, out: conditions.append(out.dtype))
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        out = net(*recorded_call(z, device)).float().cpu()
    error = (out - z.images("bf16/out")).abs().max()
    assert error < 0.15
    assert conditions == [torch.float32], "time must be embedded in float32 under autocast"
    assert (out - z.images("f32/out")).abs().max() > 1e-5, "bfloat16 was not in use"


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("1/sqrt(head size)", lambda net: [setattr(b.mixer, "scale", None) for b in net.blocks]),
        ("exact gelu", lambda net: [b.mlp.__setitem__(1, nn.GELU()) for b in net.blocks]),
        ("t scaled", lambda net: net.condition.time.frequencies.mul_(1000)),
        ("rows before columns", lambda net: net.positions.copy_(net.positions.roll(net.positions.shape[1] // 2, 1))),
        ("step size ignored", lambda net: setattr(net.condition, "ignore_step_size", True)),
    ],
)
def test_negative_control(name: str, break_it, device: torch.device) -> None:
    """Each wrong convention is far outside the tolerance of test_output."""
    z = Recording.open(GOLDEN / "dit_forward_p2.npz")
    net = build(z.json("config"), z.params()).to(device)
    with torch.no_grad():
        break_it(net)
        out = net(*recorded_call(z, device)).cpu()
    assert (out - z.images("f32/out")).abs().max() > 1e-4, name


@pytest.mark.parametrize("num_classes", [1, 1000])
def test_initialisation(num_classes: int, request: pytest.FixtureRequest) -> None:
    """Shape, scale and range of each of the 184 tensors of DiT-B/2, and their total number."""
    stats = json.loads((Path(request.config.getoption("--golden")) / "init_stats_dit_b2.json").read_text())
    recorded = stats[f"DiT-B/2 num_classes={num_classes}"]
    torch.manual_seed(0)
    net = backbones.create("dit_b_2", shape=(4, 32, 32), num_classes=num_classes, released=True)
    assert sum(p.numel() for p in net.parameters()) == recorded["total_parameters"]
    ours = flax_names(net, net.state_dict())
    assert ours.keys() == recorded["params"].keys()
    for name, value in ours.items():
        theirs = recorded["params"][name]
        assert list(value.shape) == theirs["shape"], name
        spread = 6 * theirs["std"] / np.sqrt(value.size)
        assert abs(float(value.mean()) - theirs["mean"]) <= 2 * spread + 1e-12, name
        assert abs(float(value.std()) - theirs["std"]) <= 2 * spread + 1e-12, name
        if value.size > 1e5 and "kernel" in name and "Timestep" not in name:  # uniform: the range is sharp
            assert abs(float(value.max()) - theirs["max"]) <= 1e-3 * abs(theirs["max"]), name
