"""(a) An objective with a head of its own: it learns the error to expect at (t, d), and weighs rows by it.

Kendall and Gal 2017: the loss of a row is err e^-u + u, whose minimum in u is log err. EDM2 and ESC do the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

import shortcutflow as sf
from shortcutflow.config import RunConfig
from shortcutflow.objectives import add_head
from shortcutflow.train.loop import train
from tests.core.gaussian import Gaussian
from tests.train.launched import tiny

# ---- the package


class LogVariance(nn.Module):
    """u(t, d), (b,): zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 1))
        nn.init.zeros_(self.body[2].weight)
        nn.init.zeros_(self.body[2].bias)

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        return self.body(torch.stack([t, -d.clamp(min=1 / 128).log2() / 7], dim=1))[:, 0]


class UncertainShortcut(sf.ShortcutObjective):
    """A shortcut model whose rows are weighted by their expected error."""

    kind: Literal["uncertain_shortcut"] = "uncertain_shortcut"  # type: ignore[assignment]

    def wrap(self, network: nn.Module) -> nn.Module:
        return add_head(network, LogVariance())

    def weigh(self, error: Tensor, targets: sf.Targets, aux: Tensor) -> Tensor:
        return error * (-aux).exp() + aux


# ---- what is checked


class Exact(nn.Module):
    """The exact shortcut model of Gaussian data, so that the error of a flow row is known."""

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__()
        self.net, self.unused = gaussian.net(flow_below=1 / 128), nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        return self.net(x_t.double(), t, d, y).float()


def test_the_head_learns_the_error() -> None:
    """Of flow rows it is the conditional variance of the velocity, in closed form."""
    torch.manual_seed(0)
    gaussian, generator = Gaussian.example(4), Generator().manual_seed(0)
    objective = UncertainShortcut(bootstrap_fraction=0)
    net = objective.wrap(Exact(gaussian))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(400):
        objective(net, gaussian.draw(256, generator).float(), generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    t, d = torch.linspace(0.05, 0.95, 19), torch.full((19,), 1 / 128)
    _, u = net(torch.zeros(19, 4), t, d, None)
    expected = gaussian.velocity_variance(t).mean(1).log()
    assert float(expected.max() - expected.min()) > 0.2
    assert (u - expected).abs().max() < 0.2


def test_a_run_trains_averages_and_saves_the_head(tmp_path: Path) -> None:
    config = tiny(tmp_path / "digits", "training.steps=3", "objective.kind=uncertain_shortcut")
    assert isinstance(config.objective, UncertainShortcut)
    train(config, tmp_path / "run")
    assert RunConfig.load(tmp_path / "run").objective == config.objective
    averaged = load_file(tmp_path / "run" / "weights.safetensors")
    assert averaged["objective_head.body.2.bias"].abs() > 0, "the EMA of a head that began at zero"
    run = sf.load(tmp_path / "run")
    assert not any("objective_head" in name for name in run.network.state_dict()), "samplers need no head"
    assert run.network(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.ones(1), None).shape == (1, 1, 8, 8)
