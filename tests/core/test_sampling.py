"""The sampler: what it asks a network for at every budget, what it leaves alone, and what it refuses.

Shown against networks that record their calls or whose samples have a closed form; wrong step sizes, times, guidance
and a second call for one step are each told apart by the same checks.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import shortcutflow as sf
from shortcutflow.schedule import step_sizes
from shortcutflow.types import Network
from tests.core.networks import Learner, Recorder, affine, zero

BUDGETS: list[Any] = [1, 2, 3, 7, 100, 128, 200, [0.5, 0.2, 0.3]]


def noise_of(*shape: int) -> Tensor:
    return sf.draw_noise(shape, generator=Generator().manual_seed(0))


# ---- calls


@pytest.mark.parametrize("steps", BUDGETS, ids=str)
def test_one_call_a_step(steps: Any) -> None:
    net = Recorder(affine)
    sf.sample(net, noise_of(5, 3), steps=steps)
    assert len(net.calls) == (steps if isinstance(steps, int) else len(steps))
    assert all(len(call.x_t) == 5 and not call.with_gradient for call in net.calls)


@pytest.mark.parametrize("steps", BUDGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_time_and_step_size_given_to_the_network(steps: Any, dtype: torch.dtype) -> None:
    net, sizes = Recorder(affine), step_sizes(steps)
    sf.sample(net, noise_of(5, 3).to(dtype), steps=steps)
    starts = [0.0, *itertools.accumulate(sizes)][:-1]
    for call, start, size in zip(net.calls, starts, sizes, strict=True):
        assert call.t.shape == call.d.shape == (5,)
        assert call.t.dtype == call.d.dtype == torch.float32
        assert call.t.tolist() == pytest.approx([start] * 5, abs=1e-6)
        # Steps finer than 1/M follow the flow, which the network knows as 1/M.
        assert call.d.tolist() == pytest.approx([max(size, 1 / 128)] * 5, rel=1e-6)


def test_times_of_equal_steps_are_exact() -> None:
    """i/N to the last bit of float32, which adding up 1/200 does not give."""
    net = Recorder(zero)
    sf.sample(net, noise_of(1, 3), steps=200)
    assert [float(call.t) for call in net.calls] == torch.tensor([i / 200 for i in range(200)]).tolist()
    added = list(itertools.accumulate(torch.full((199,), 1 / 200).tolist(), initial=0.0))
    assert torch.tensor(added).tolist() != torch.tensor([i / 200 for i in range(200)]).tolist()


def test_flow_only_tells_no_step_size() -> None:
    net, told = Recorder(affine), Recorder(affine)
    flow, shortcut = (sf.sample(n, noise_of(5, 3), steps=3, flow_only=n is net) for n in (net, told))
    assert [float(call.d[0]) for call in net.calls] == [0, 0, 0]
    assert [float(call.d[0]) for call in told.calls] == [0.5, 0.25, 0.25]
    assert [float(call.t[0]) for call in net.calls] == [0, 0.5, 0.75] == [float(call.t[0]) for call in told.calls]
    assert not torch.allclose(flow, shortcut)


def cost_over_the_network(sampler: Callable[[Network, Tensor], object]) -> float:
    """Median time of a sampler over that of the network alone, in turns so that a busy machine slows both."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(256, 1536), nn.GELU(), nn.Linear(1536, 1536), nn.GELU(), nn.Linear(1536, 256))
    x, ones = noise_of(96, 256), torch.ones(96)

    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
        return body(x_t)

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    with torch.no_grad():
        pairs = [(seconds(lambda: sampler(net, x)), seconds(lambda: net(x, 0 * ones, ones, None))) for _ in range(41)]
    return statistics.median(ours for ours, _ in pairs[1:]) / statistics.median(alone for _, alone in pairs[1:])


def test_one_step_costs_the_network_and_nothing_else() -> None:
    # A busy machine may disturb one measurement; a real cost would show in all.
    assert any(cost_over_the_network(lambda net, x: sf.sample(net, x)) < 1.1 for _ in range(3))
    assert cost_over_the_network(lambda net, x: sf.sample(net, x, steps=2)) > 1.5


# ---- states


def states_by_hand(noise: Tensor, sizes: list[float], told: float = 1) -> list[Tensor]:
    """Euler steps of the affine network, written out; it is told ``told`` times the step size."""
    states, t = [noise], 0.0
    for size in sizes:
        x = states[-1]
        states.append(x + size * (0.5 * x + t + 3 * told * size))
        t += size
    return states


@pytest.mark.parametrize("steps", [1, 3, 8, [0.5, 0.2, 0.3]], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 10, 4), (5, 6)], ids=str)
def test_trajectory_keeps_every_state(steps: Any, shape: tuple[int, ...]) -> None:
    noise, sizes = noise_of(*shape), step_sizes(steps)
    path = sf.trajectory(affine, noise, steps=steps)
    assert path.t.tolist() == pytest.approx([0.0, *itertools.accumulate(sizes)], abs=1e-6)
    assert float(path.t[-1]) == 1
    assert torch.equal(path.x_t[0], noise)
    assert torch.equal(path.x_t[-1], sf.sample(affine, noise, steps=steps))
    torch.testing.assert_close(path.x_t, torch.stack(states_by_hand(noise, sizes)))
    assert not torch.allclose(path.x_t, torch.stack(states_by_hand(noise, sizes, told=0.5)))


def test_noise_by_its_shape() -> None:
    """A shape and a generator give the samples of draw_noise with that generator."""
    for shape in ((5, 3, 4, 4), [5, 10, 4], torch.Size((5, 6))):
        noise = sf.draw_noise(shape, generator=Generator().manual_seed(3))
        drawn = sf.sample(affine, shape, steps=2, generator=Generator().manual_seed(3))
        assert torch.equal(drawn, sf.sample(affine, noise, steps=2))
        assert torch.equal(sf.trajectory(zero, shape, generator=Generator().manual_seed(3)).x_t[0], noise)
        assert not torch.equal(drawn, sf.sample(affine, shape, steps=2, generator=Generator().manual_seed(4)))


def test_noise_by_its_shape_is_drawn_where_the_network_is() -> None:
    """A device that holds no numbers stands for a GPU; without a generator ``torch.manual_seed`` decides."""
    net = Learner().to("meta")
    for network in (net, net.forward, partial(net)):
        assert sf.sample(network, (2, 3), sampler="consistency", steps=2, generator=Generator()).device.type == "meta"
    assert sf.draw_noise((2, 3), generator=Generator(), device="meta").device.type == "meta"
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(sf.sample(zero, (2, 3)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_noise_is_standard_normal() -> None:
    noise = noise_of(200, 500)
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 4.5 / 100_000**0.5
    assert abs(float(noise.var()) - 1) < 4.5 * (2 / 100_000) ** 0.5


@pytest.mark.parametrize("steps", [1, 4])
def test_the_noise_that_is_given_is_not_modified(steps: int) -> None:
    noise, net = noise_of(5, 3), Recorder(affine)
    before = noise.clone()
    samples = sf.sample(net, noise, steps=steps)
    assert torch.equal(noise, before)
    assert not torch.equal(samples, before)
    assert samples.data_ptr() != noise.data_ptr()


# ---- networks


def test_no_gradient_and_no_change_of_mode() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    x = sf.sample(lambda x, t, d, y: net(x), noise_of(5, 3).requires_grad_(), steps=2)
    assert not x.requires_grad
    assert not sf.trajectory(Learner(), noise_of(5, 3), steps=2).x_t.requires_grad
    assert net.training
    assert torch.is_grad_enabled()


def test_samples_keep_the_dtype_of_the_noise() -> None:
    """Whether the network answers in a narrower type or in a wider one."""

    def answering(dtype: torch.dtype) -> Network:
        return lambda x_t, t, d, y: affine(x_t, t, d, y).to(dtype)

    for answer in (torch.bfloat16, torch.float32, torch.float64):
        for noise in (noise_of(5, 3), noise_of(5, 3).double()):
            assert sf.sample(answering(answer), noise, steps=4).dtype == noise.dtype


def test_progress_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = sf.sample(affine, noise_of(5, 3), steps=3)
    assert capsys.readouterr().err == ""
    assert torch.equal(sf.sample(affine, noise_of(5, 3), steps=3, progress=True), quiet)
    assert "3/3" in capsys.readouterr().err


# ---- guidance

LABELS, NULL = torch.arange(5), -4
VECTORS, NULL_VECTOR = torch.linspace(1, 2, 15).view(5, 3), torch.tensor([-1.0, -2.0, 0.5])


def guided_by_hand(noise: Tensor, y: Tensor, null: Tensor, scale: float, steps: int) -> Tensor:
    """Samples of the network that answers with the sum of its condition: the noise plus the guided condition."""
    y, null = (value.float().reshape(len(noise), -1).sum(1, keepdim=True) for value in (y, null))
    x = noise
    for _ in range(steps):
        x = x + (null + scale * (y - null)) / steps
    return x


def condition_alone(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None, /) -> Tensor:
    assert y is not None
    return y.float().reshape(len(y), -1).sum(1, keepdim=True).expand_as(x_t)


@pytest.mark.parametrize(
    ("y", "null"),
    [(LABELS, NULL), (VECTORS, NULL_VECTOR), (VECTORS, 0.5)],
    ids=["labels", "vectors", "number"],
)
@pytest.mark.parametrize(("scale", "rows"), [(1, 5), (0, 5), (1.5, 10), (-1, 10), (4, 10)])
@pytest.mark.parametrize("steps", [1, 4])
def test_guidance(y: Tensor, null: Any, scale: float, rows: int, steps: int) -> None:
    """s_null + scale (s_y - s_null): one call a step, of twice the batch unless one condition alone is asked."""
    net, noise = Recorder(condition_alone), noise_of(5, 3)
    x = sf.sample(net, noise, y, steps=steps, guidance_scale=scale, null_y=null)
    nulls = torch.as_tensor(null, dtype=y.dtype).expand_as(y)
    torch.testing.assert_close(x, guided_by_hand(noise, y, nulls, scale, steps))
    assert not torch.allclose(x, guided_by_hand(noise, nulls, y, scale, steps)), "conditions exchanged"
    assert not torch.allclose(x, guided_by_hand(noise, y, nulls, scale + 1, steps))
    assert [len(call.x_t) for call in net.calls] == [rows] * steps
    asked = net.calls[0].y
    assert asked is not None
    expected = {1.0: y, 0.0: nulls}.get(scale, torch.cat([y, nulls]))
    assert torch.equal(asked, expected)


def test_without_guidance_no_null_condition_is_needed() -> None:
    net = Recorder(affine)
    sf.sample(net, noise_of(5, 3), LABELS)
    assert net.calls[0].y is LABELS
    sf.sample(net, noise_of(5, 3))
    assert net.calls[1].y is None


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least 1, got 0"),
        ({"steps": 2.0}, r"whole number or a sequence of step sizes, got 2\.0"),
        ({"steps": [0.5, 0.4]}, r"add up to 1, got \[0\.5, 0\.4\]"),
        ({"steps": 3, "finest_steps": 100}, "power of two, at least 2, got 100"),
        ({"y": torch.arange(4)}, r"noise has 5, y has shape \(4,\)"),
        (
            {"y": LABELS, "null_y": 10, "guidance_scale": float("nan")},
            "guidance_scale must be a finite number, got nan",
        ),
        ({"y": LABELS, "null_y": 10, "guidance_scale": float("-inf")}, "guidance_scale must be a finite .* got -inf"),
        ({"guidance_scale": 2}, "guidance_scale 2 needs a condition y"),
        ({"guidance_scale": 0}, "guidance_scale 0 needs a condition y"),
        ({"y": LABELS, "guidance_scale": 2}, "need null_y"),
        ({"noise": torch.zeros(5, 3).long()}, r"noise must be a float tensor .* got torch.int64 \(5, 3\)"),
        ({"noise": torch.zeros(5)}, r"noise must be a float tensor .* got torch.float32 \(5,\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", [sf.sample, sf.trajectory])
def test_bad_arguments(sampler: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(affine, **({"noise": noise_of(5, 3)} | arguments))


@pytest.mark.parametrize("output", [lambda x: x[:, :1], lambda x: x[:1], lambda x: x[0]], ids=["narrow", "row", "bare"])
def test_network_of_another_shape(output: Callable[[Tensor], Tensor]) -> None:
    """All of these would broadcast in an Euler step."""
    noise = noise_of(5, 3)
    shapes = f"(5, 3), not {tuple(output(noise).shape)}"
    with pytest.raises(ValueError, match=re.escape(shapes)):
        sf.sample(lambda x, t, d, y: output(x), noise)


# ---- the way back


def test_inversion_calls_the_network_at_the_times_of_sampling_with_the_flow() -> None:
    there, back = Recorder(affine), Recorder(affine)
    data = sf.sample(there, noise_of(5, 3), steps=200, flow_only=True)
    noise = sf.invert(back, data, steps=200)
    assert noise.shape == data.shape
    assert [call.t.tolist() for call in back.calls] == [call.t.tolist() for call in reversed(there.calls)]
    assert all((call.d == 0).all() and not call.with_gradient for call in back.calls)


def test_inversion_is_guided_as_sampling_is() -> None:
    data, y = noise_of(5, 3), torch.arange(5)
    guided = sf.invert(affine, data, y, steps=1, guidance_scale=2, null_y=9)
    v = 2 * affine(data, torch.zeros(5), torch.zeros(5), y) - affine(data, torch.zeros(5), torch.zeros(5), y * 0 + 9)
    torch.testing.assert_close(guided, data - v)
    assert not torch.allclose(sf.invert(affine, data, y, steps=1), guided)


@pytest.mark.parametrize(
    ("data", "y", "options", "message"),
    [
        (torch.zeros(5, 3), None, {"steps": 0}, "steps must be at least 1, got 0"),
        (torch.zeros(5), None, {}, "data must be a float tensor"),
        (torch.zeros(5, 3), torch.arange(4), {}, "4"),
        (torch.zeros(5, 3), torch.arange(5), {"guidance_scale": 2}, "null_y"),
    ],
    ids=["steps", "shape", "labels", "null"],
)
def test_inversions_that_are_refused(data: Tensor, y: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.invert(affine, data, y, **options)
