"""A network that predicts data is one of velocities to all that call it, and its weighted loss is Dreamer 4's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import shortcutflow as sf
from shortcutflow.data.digits import write_digits
from shortcutflow.interop.export import FORMATS, export_model
from shortcutflow.network import LEAST_TIME_LEFT, predict_data
from shortcutflow.train.loop import train
from tests.core.networks import Learner
from tests.interop.exported import FAMILIES, model_in, noise_for
from tests.train.launched import tiny

M = 8


def seeded() -> Generator:
    return Generator().manual_seed(0)


def dreamer(x_hat: Learner, rows: sf.Targets, data: Tensor) -> Tensor:
    """The shortcut forcing of Dreamer 4 (its tau is t), written out for a network of data x^."""

    def velocity(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        return (x_hat(x, t, d, None) - x) / (1 - t)[:, None]

    n, x, t, d = rows.n_bootstrap, rows.x_t, rows.t, rows.d
    flow = (x_hat(x, t, d, None) - data).square().mean(1)[n:]
    x, t, d = x[:n], t[:n], d[:n]
    with torch.no_grad():
        first = velocity(x, t, d / 2)
        second = velocity(x + first * d[:, None] / 2, t + d / 2, d / 2)
    bootstrap = (1 - t) ** 2 * (velocity(x, t, d) - (first + second) / 2).square().mean(1)
    return ((0.9 * rows.t + 0.1) * torch.cat([bootstrap, flow])).mean()


def test_the_loss_is_that_of_dreamer_4() -> None:
    data, net = torch.randn(64, 3, generator=seeded()), Learner()
    converted = predict_data(Learner())
    objective = sf.ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5, time_weight="ramp")
    report = objective(converted, data, generator=seeded())
    expected = dreamer(net, report.targets, data)
    torch.testing.assert_close(report.loss, expected)
    (gradient,) = torch.autograd.grad(report.loss, list(converted.parameters()))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, net.weight)[0])
    # Neither alone is enough, and what is reported has no weight.
    plain = sf.ShortcutObjective(finest_steps=M, bootstrap_fraction=0.5)
    unweighted = plain(converted, data, generator=seeded())
    for other in (unweighted.loss, objective(net, data, generator=seeded()).loss):
        assert abs(other - expected) > 0.05 * expected
    assert torch.equal(report.row_loss, unweighted.row_loss)


class Fixed(nn.Module):
    """One picture, whatever it is asked; in a type of its own, with something beside it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.tensor([3.0, -1.0], dtype=dtype))

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Any:
        return self.picture.expand_as(x_t), t


@pytest.mark.parametrize("steps", [1, 3, 128, 1024])
def test_every_sampler_ends_at_the_prediction(steps: int) -> None:
    noise, net = torch.randn(4, 2, generator=seeded()), Fixed()
    samples = sf.sample(predict_data(net), noise, steps=steps, finest_steps=1024)
    torch.testing.assert_close(samples, net.picture.expand(4, 2).detach(), atol=2e-5, rtol=0)
    assert not torch.allclose(sf.sample(Fixed(), noise, steps=steps, finest_steps=1024), samples, atol=0.1)


def test_the_velocity_is_bounded_at_the_end_and_in_float32() -> None:
    t, x_t = torch.tensor([0.0, 0.5, 1 - 1 / 4096, 1.0]), torch.zeros(4, 2)
    v, aux = predict_data(Fixed(torch.bfloat16))(x_t, t, t, None)
    assert v.dtype == torch.float32
    assert torch.equal(aux, t)
    expected = torch.tensor([3.0, -1.0]) / torch.tensor([1, 0.5, LEAST_TIME_LEFT, LEAST_TIME_LEFT])[:, None]
    torch.testing.assert_close(v, expected)


def test_a_run_of_it(tmp_path: Path) -> None:
    """Trained, resumed, averaged, loaded and sampled; a run of velocities cannot start from it."""
    write_digits(tmp_path / "digits")
    chosen = ("backbone.prediction=data", "objective.time_weight=ramp", "training.checkpoint_every=2")
    config = tiny(tmp_path / "digits", *chosen, "training.steps=4")
    train(config, tmp_path / "whole")
    train(config.model_copy(update={"training": config.training.model_copy(update={"steps": 2})}), tmp_path / "stopped")
    train(config, tmp_path / "stopped", resume=True)
    # The schedule of the learning rate is constant, that of progress is not used.
    whole, resumed = (sf.load(tmp_path / name) for name in ("whole", "stopped"))
    noise, y = noise_for(4, 1, 8, 8), torch.arange(4)
    samples = whole.sample(noise, y, steps=1)
    assert torch.equal(samples, resumed.sample(noise, y, steps=1))
    raw = whole.network.forward(noise, torch.zeros(4), torch.ones(4), y)
    torch.testing.assert_close(samples, raw.detach(), msg="in one step it is what the network itself puts out")
    assert samples.abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"predicts data, this run .* predicts velocity"):
        train(tiny(tmp_path / "digits", f"start={tmp_path / 'whole'}"), tmp_path / "other")
    train(tiny(tmp_path / "digits", *chosen, f"start={tmp_path / 'whole'}", "training.steps=1"), tmp_path / "same")


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exported(format: str, tmp_path: Path) -> None:
    """An export compares itself with the library's sampler; that one is another than of the same weights' velocity."""
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    backbone = {"name": "dit", "options": FAMILIES["dit"]}
    source = model_in(tmp_path / "model", backbone | {"prediction": "data"})
    export_model(source, tmp_path / f"out{FORMATS[format].suffix}", format)
    noise, y = noise_for(4, 3, 4, 4), torch.arange(4)
    of_velocity = sf.load(model_in(tmp_path / "other", backbone)).sample(noise, y, steps=1)
    torch.testing.assert_close(sf.load(source).sample(noise, y, steps=1), of_velocity - noise, atol=1e-5, rtol=1e-4)
