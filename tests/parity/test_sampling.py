"""Samples of the released code from the same noise, for every number of steps and guidance scale recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shortcutflow as sf
from tests.conftest import GOLDEN
from tests.parity.recorded import Recording, build


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    if "run" in metafunc.fixturenames:
        runs = []
        for file in sorted(folder.glob("sampling*.npz")):
            names = {"/".join(n.split("/")[:2]) for n in Recording.open(file).arrays if n.endswith("/x")}
            runs += [(file, n) for n in sorted(names) if n.split("/")[0] in ("shortcut", "shortcut_ema", "naive")]
        metafunc.parametrize("run", runs, ids=lambda r: f"{r[0].stem}-{r[1]}")


def test_samples(run: tuple[Path, str], device: torch.device) -> None:
    file, name = run
    z = Recording.open(file)
    kind, budget = name.split("/")
    steps, scale = (float(part.lstrip("stepcfg")) for part in budget.split("_"))
    config = z.json("config")
    params = z.params("params_ema" if kind.endswith("_ema") else "params")
    net = build(config, params, ignore_step_size=kind == "naive").to(device)
    x = sf.sample(
        net,
        z.images("x0").to(device),
        z.tensor("labels").long().to(device),
        steps=int(steps),
        guidance_scale=scale,
        null_y=config["num_classes"],
    )
    assert (x.cpu() - z.images(f"{name}/x")).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 4, 128])
def test_trained_digits(steps: int, device: torch.device) -> None:
    """The network the authors' code trained on the digits gives their samples, entry by entry."""
    z = Recording.open(GOLDEN / "digits_reference.npz")
    arch = z.json("arch")
    net = build(arch, z.params()).to(device)
    x0 = z.images("x0").to(device)
    null = torch.full((len(x0),), arch["num_classes"], device=device)
    x = sf.sample(net, x0, null, steps=steps)
    assert (x.cpu() - z.images(f"samples_{steps}")).abs().max() < 1e-4


def test_negative_control(device: torch.device) -> None:
    """A sampler that tells the network the flow's step size at every budget gives other samples."""
    z = Recording.open(GOLDEN / "sampling.npz")
    net = build(z.json("config"), z.params()).to(device)
    labels = z.tensor("labels").long().to(device)
    x = sf.sample(net, z.images("x0").to(device), labels, steps=4, flow_only=True)
    assert (x.cpu() - z.images("shortcut/steps4_cfg1/x")).abs().max() > 1e-2
