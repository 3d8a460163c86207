"""The samplers of consistency models and of live reflow: what they tell the network, and where they end."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from shortcutflow import sample, trajectory
from shortcutflow.types import SamplerKind
from tests.core.baseline_cases import BASELINES, every_baseline
from tests.core.gaussian import Gaussian
from tests.core.networks import Recorder, affine, zero

GAUSSIAN = Gaussian.example(2, 3)


def told(steps: int, sampler: SamplerKind, **options: bool) -> list[float]:
    """The step sizes that the network hears."""
    net = Recorder(affine)
    sample(net, (2, 3), steps=steps, sampler=sampler, finest_steps=8, generator=Generator().manual_seed(0), **options)
    return [float(call.d[0]) for call in net.calls]


def test_step_sizes_that_are_told() -> None:
    assert told(4, "euler") == [1 / 4] * 4
    assert told(4, "consistency") == [1, 3 / 4, 1 / 2, 1 / 4]
    assert told(3, "consistency") == [1, 1 / 2, 1 / 4]
    assert told(4, "live_reflow") == [1] * 4
    assert told(8, "live_reflow") == [1 / 8] * 8
    assert told(16, "live_reflow") == [1 / 8] * 16, "the flow, which is 1/M to the network"
    for sampler in ("euler", "consistency", "live_reflow"):
        assert told(4, sampler, flow_only=True) == [0] * 4


def moments_off(steps: int, noise_scale: float = 1) -> float:
    """How far mean and deviation of the exact consistency model's samples are from the data's."""
    generator = Generator().manual_seed(0)
    noise = GAUSSIAN.noise(20_000, generator)

    def fresh(i: int) -> Tensor:
        return noise_scale * GAUSSIAN.noise(20_000, generator)

    x = sample(GAUSSIAN.net(), noise, steps=steps, sampler="consistency", fresh_noise=fresh)
    return float(torch.stack([x.mean(0) - GAUSSIAN.mu, x.std(0) - GAUSSIAN.s]).abs().max())


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_every_budget_of_consistency_sampling_gives_the_data(steps: int) -> None:
    assert moments_off(steps) < 0.05
    if steps > 1:
        assert moments_off(steps, noise_scale=0) > 0.1


def test_one_consistency_step_is_the_flow_map(generator: Generator) -> None:
    noise = GAUSSIAN.noise(8, generator)
    x = sample(GAUSSIAN.net(), noise, sampler="consistency")
    torch.testing.assert_close(x, GAUSSIAN.flow_map(noise, torch.zeros(8), torch.ones(8)))


def test_noise_is_added_after_each_step_but_the_last() -> None:
    asked: list[int] = []

    def fresh(i: int) -> Tensor:
        asked.append(i)
        return torch.ones(2, 3)

    states = trajectory(zero, torch.zeros(2, 3), steps=4, sampler="consistency", fresh_noise=fresh)
    assert asked == [0, 1, 2]
    assert states.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    # Jumps of length zero: what was there shrinks by t + d, and 1 - t - d of ones is added.
    assert states.x_t[:, 0, 0].tolist() == [0, 0.75, 0.875, 0.90625, 0.90625]


def test_fresh_noise_comes_from_the_generator() -> None:
    def made(seed: int) -> Tensor:
        generator = Generator().manual_seed(seed)
        return sample(affine, torch.ones(2, 3), steps=4, sampler="consistency", generator=generator)

    torch.manual_seed(0)
    first = made(0)
    torch.manual_seed(1)  # the global generator has no part in it
    assert torch.equal(made(0), first)
    assert not torch.equal(made(1), first)


def test_what_is_refused() -> None:
    noise = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="pass fresh_noise or a generator"):
        sample(affine, noise, steps=2, sampler="consistency")
    sample(affine, noise, steps=1, sampler="consistency")  # needs none
    with pytest.raises(ValueError, match=r"the shape of x_t, \(2, 3\), not \(3,\)"):
        sample(affine, noise, steps=2, sampler="consistency", fresh_noise=lambda _: torch.zeros(3))
    with pytest.raises(ValueError, match="unknown sampler 'heun'; known: euler, consistency, live_reflow"):
        sample(affine, noise, sampler="heun", flow_only=True)  # type: ignore[arg-type]


@every_baseline
def test_each_objective_names_its_sampler(objective: object) -> None:
    name = next(n for n, o in BASELINES.items() if o is objective)
    expected = next((k for k in ("consistency", "live_reflow") if name.startswith(k)), "euler")
    assert objective.sampler == expected  # type: ignore[attr-defined]
    assert objective.step_conditioned == (not name.startswith("reflow"))  # type: ignore[attr-defined]
