"""DiT's checkpoints: a diffusion network that predicts noise, asked as a velocity; and its own sampler, DDIM."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import backbones
import shortcutflow as sf
from backbones.diffusion import Diffusion
from shortcutflow.interop.convert import convert
from tests.interop.public_layouts import PublicTransformer, Schedule, saved

SCHEDULE = Schedule()
LOWEST, HIGHEST = float(SCHEDULE.t[-1]), float(SCHEDULE.t[0])
TIMES = (0.25, 0.9, 0.0, 1e-3, LOWEST, 0.007, 1 / 128, 0.1, 0.5, 0.75, 0.98, HIGHEST, 127 / 128, 1.0)
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "pixels, patch 4": {"size": 16, "patch": 4, "channels": 3, "heads": 4, "doubled": False},
    "256 pixels": {"size": 32, "depth": 1},
    "512 pixels": {"size": 64, "depth": 1},
}
LABELS = torch.tensor([1, 5])
"""Of two samples, the second without one."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these are slower with more, many times so beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise_of(network: PublicTransformer, batch: int = 2, seed: int = 1) -> Tensor:
    size = math.isqrt(network.pos_embed.shape[1]) * network.patch
    return torch.randn(batch, network.channels, size, size, generator=torch.Generator().manual_seed(seed))


def opened(network: PublicTransformer, folder: Path, **options: Any) -> sf.Model:
    """The network, saved, converted and loaded."""
    heads = network.blocks[0].attn.heads
    convert(saved(network, folder / "net.pt"), folder / "out", **({"kind": "dit", "heads": heads} | options))
    return sf.load(folder / "out")


def denoiser(network: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, i: network(z, i, LABELS)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_velocities_are_made_of_the_originals_noise(size: str, tmp_path: Path) -> None:
    """At all t, the ends and the borders of the schedule among them; in parts of the factor 1/t that the noise has."""
    original = PublicTransformer(**SIZES[size])
    t = torch.tensor(TIMES if SIZES[size].get("size", 8) < 32 else TIMES[:2])
    y = LABELS.repeat(7)[: len(t)]
    model, x = opened(original, tmp_path), noise_of(original, len(t))
    got = model.network(x, t, torch.zeros_like(t), y)
    for k, time in enumerate(t.tolist()):
        one = slice(k, k + 1)
        expected = SCHEDULE.velocity(lambda z, i, one=one: original(z, i, y[one]), x[one], time)
        assert expected.std() > 0.3
        assert (got[one] - expected).abs().max() < 1e-5 / max(time, LOWEST), time
    for d in (1 / 128, 1.0):
        assert torch.equal(model.network(x, t, torch.full_like(t, d), y), got), "the step size has no effect"


@torch.no_grad()
def test_what_would_be_wrong_is_seen(tmp_path: Path) -> None:
    original = PublicTransformer()
    model, x = opened(original, tmp_path), noise_of(original)
    got = model.network(x, torch.full((2,), 0.5), torch.zeros(2), LABELS)
    shifted = Schedule([1e-4 + i * (0.02 - 1e-4) / 998 for i in range(1000)])
    wrong = {
        "another schedule": shifted.velocity(denoiser(original), x, 0.5),
        "z is x_t": SCHEDULE.velocity(lambda z, i: original(z * math.sqrt(0.5), i, LABELS), x, 0.5),
        "one time off": SCHEDULE.velocity(lambda z, i: original(z, i + 1, LABELS), x, 0.5),
        "other labels": SCHEDULE.velocity(lambda z, i: original(z, i, LABELS.flip(0)), x, 0.5),
    }
    for name, expected in wrong.items():
        assert (got - expected).abs().max() > 1e-4, name


@torch.no_grad()
def test_ddim_is_eulers_method(tmp_path: Path) -> None:
    """A step of DDIM from one time to an earlier one is a step along the velocity, whatever its size."""
    original = PublicTransformer()
    model, z = opened(original, tmp_path), noise_of(original)
    times = list(range(999, -1, -111))
    x = z * math.hypot(LOWEST, 1 - LOWEST)
    for i, j in zip(times, [*times[1:], None], strict=True):
        eps = original(z, torch.full((2,), float(i)), LABELS).double()
        data = (z - SCHEDULE.sigma[i] * eps) / SCHEDULE.alpha[i]
        z = (data if j is None else SCHEDULE.alpha[j] * data + SCHEDULE.sigma[j] * eps).float()
        t, end = float(SCHEDULE.t[i]), 1.0 if j is None else float(SCHEDULE.t[j])
        x = x + (end - t) * model.network(x, torch.full((2,), t), torch.zeros(2), LABELS)
        assert (x - z * math.hypot(end, 1 - end)).abs().max() < 1e-4 * z.abs().max()
    assert z.std() > 0.3


@pytest.fixture(scope="module")
def trained() -> PublicTransformer:
    """A small network that has learnt to predict the noise of slopes: one whose samples mean something."""
    network = PublicTransformer(size=4, channels=1, depth=1, heads=1, doubled=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = (torch.from_numpy(part).float() for part in (SCHEDULE.alpha, SCHEDULE.sigma))
    slope = torch.linspace(-1, 1, 4).expand(4, 4)
    for _ in range(150):
        y = torch.randint(2, (64,), generator=generator)
        data = torch.where(y[:, None, None] == 0, slope, slope.T)[:, None]
        i = torch.randint(1000, (64,), generator=generator)
        eps = torch.randn(data.shape, generator=generator)
        z = alpha[i, None, None, None] * data + sigma[i, None, None, None] * eps
        (network(z, i.float(), y) - eps).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


@torch.no_grad()
def test_many_steps_reach_the_image_of_ddim(trained: PublicTransformer, tmp_path: Path) -> None:
    """Of 500 steps of diffusers' DDIM, from the same noise, where the schedule begins and from t = 0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    model, noise, y = opened(trained, tmp_path), noise_of(trained), torch.tensor([0, 1])
    scheduler.set_timesteps(500)
    z = noise
    for i in scheduler.timesteps:
        z = scheduler.step(trained(z, i.float().expand(2), y), i, z).prev_sample

    def off(x: Tensor) -> float:
        return float((x - z).square().mean().sqrt() / z.std())

    def walked(steps: int) -> Tensor:
        """Times that are even in the diffusion's, most of them between two of its own."""
        times = np.interp(np.linspace(999, 0, steps + 1), np.arange(1000), SCHEDULE.t).tolist()
        x = noise * math.hypot(LOWEST, 1 - LOWEST)
        for t, end in itertools.pairwise([*times, 1.0]):
            x = x + (end - t) * model.network(x, torch.full((2,), t), torch.zeros(2), y)
        return x

    few, many = off(walked(25)), off(walked(200))
    assert few < 0.1
    assert many < few / 3
    # Between t = 0 and the schedule's beginning a little of the data is added to the noise, which DDIM leaves out.
    assert off(model.sample(noise, y, steps=256)) < 0.1
    assert off(model.sample(noise, y.flip(0), steps=32)) > 0.3, "the other label is another image"


def test_the_error_halves_as_steps_double() -> None:
    """For normal data, whose noise a formula predicts: even steps of the flow against 1000 of DDIM."""
    diffusion, mean, deviation = Diffusion("noise"), 0.5, 0.3
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).double()

    def eps(z: Tensor, i: Tensor) -> Tensor:
        places = i[:, None], np.arange(1000)
        alpha, sigma = (torch.from_numpy(np.interp(*places, part)) for part in (SCHEDULE.alpha, SCHEDULE.sigma))
        return sigma * (z - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

    z = noise
    for i in range(999, -1, -1):
        predicted = eps(z, torch.full((64,), float(i)))
        z = (z - SCHEDULE.sigma[i] * predicted) / SCHEDULE.alpha[i]
        if i:
            z = SCHEDULE.alpha[i - 1] * z + SCHEDULE.sigma[i - 1] * predicted
    errors = []
    for steps in (16, 32, 64):
        x, size = (noise * math.hypot(LOWEST, 1 - LOWEST)).float(), (1 - LOWEST) / steps
        for k in range(steps):
            t = torch.full((64,), LOWEST + k * size)
            x = x + size * diffusion.velocity(eps(diffusion.state(x, t), diffusion.time(t)), x, t)
        errors.append(float((x - z).square().mean().sqrt()))
    assert errors[0] < 0.05
    for more, fewer in itertools.pairwise(errors):
        assert 0.4 < fewer / more < 0.6, errors


def test_the_step_size_can_be_learnt(tmp_path: Path) -> None:
    original = PublicTransformer()
    model, x = opened(original, tmp_path), noise_of(original)
    t = torch.tensor([0.25, 0.5])
    model.network(x, t, t, LABELS).square().mean().backward()
    last = model.network.get_parameter("condition.step.out.weight")
    assert last.grad is not None
    assert last.grad.any()
    with torch.no_grad():
        last -= 0.1 * last.grad / last.grad.norm()
    assert not torch.allclose(model.network(x, t, t, LABELS), model.network(x, t, t.flip(0), LABELS))


def test_what_the_folder_says(tmp_path: Path) -> None:
    config, notes = convert(saved(PublicTransformer(), tmp_path / "DiT-XL-2-256x256.pt"), tmp_path / "out")
    assert config.backbone.options["diffusion"]["predicts"] == "noise"
    assert (config.shape, config.num_classes, config.null_y, config.vae) == (
        (4, 8, 8), 5, 5, "stabilityai/sd-vae-ft-mse",
    )  # fmt: skip
    assert any("noise of the linear schedule" in note for note in notes)
    assert "DiT checkpoint, DiT-XL-2-256x256.pt" in config.about["source"]


# ---- the formulas


BETAS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"schedule": "squaredcos_cap_v2"},
    "sigmoid": {"schedule": "sigmoid"},
    "short": {"steps": 100, "beta_end": 0.2},
    "given": {"betas": [0.01 * (i + 1) for i in range(50)]},
    "zero": {"zero_terminal_snr": True},
}


@pytest.mark.parametrize("predicts", ["noise", "v", "data"])
@pytest.mark.parametrize("betas", BETAS)
def test_a_network_that_knows_the_answer_gives_the_velocity(predicts: str, betas: str) -> None:
    """At the schedule's own times: they are whole numbers, z is as in training, and the velocity is x_1 - eps."""
    diffusion = Diffusion(predicts, **BETAS[betas])
    ratio = diffusion.log_ratios.exp()
    t = (1 / (1 + ratio)).float()
    data, eps = torch.randn(2, len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (1 / (1 + ratio**2).sqrt()), ratio / (1 + ratio**2).sqrt()
    x_t = (t.double()[:, None] * data + (1 - t.double()[:, None]) * eps).float()
    assert (diffusion.time(t) - torch.arange(len(t))).abs().max() < 0.02
    z = alpha[:, None] * data + sigma[:, None] * eps
    assert (diffusion.state(x_t, t) - z).abs().max() < 1e-5
    truth = {"noise": eps, "data": data, "v": alpha[:, None] * eps - sigma[:, None] * data}[predicts]
    v = diffusion.velocity(truth.float(), x_t, t)
    inverse = {"noise": 1 / t, "data": 1 / (1 - t), "v": torch.ones_like(t)}[predicts][:, None]
    assert ((v - (data - eps)) / inverse).abs().max() < 2e-6


@pytest.mark.parametrize("predicts", ["noise", "v", "data"])
def test_velocities_are_continuous_and_finite(predicts: str) -> None:
    diffusion = Diffusion(predicts)
    x, out = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0))
    t = torch.cat([torch.linspace(0, 1, 4001), torch.tensor([LOWEST, HIGHEST])]).sort().values
    v = diffusion.velocity(out.expand(len(t), 5), x.expand(len(t), 5), t)
    assert v.isfinite().all()
    assert v.abs().max() < 3 * 157 * 3
    jumps = (v.diff(dim=0) / v[1:].abs().clamp(min=1)).abs().max()
    assert jumps < 0.1
    assert torch.equal(diffusion.time(t).sort(descending=True).values, diffusion.time(t)), "more noise, later"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicts": "score"}, "predicts must be one of 'noise', 'v', 'data', got 'score'"),
        ({"schedule": "quadratic"}, "schedule must be one of 'linear', .*, got 'quadratic'"),
        ({"steps": 1}, "between 2 and 1000000 steps, got 1"),
        ({"betas": [0.1, 1.0]}, "betas must be at least two numbers between 0 and 1"),
        ({"beta_end": 2.0}, "betas must be"),
        ({"beta_stop": 0.02}, "unexpected keyword argument 'beta_stop'"),
    ],
    ids=str,
)
def test_diffusions_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.create("dit", shape=(3, 8, 8), width=16, depth=1, heads=1, diffusion=options)
