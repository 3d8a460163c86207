"""Averages of the weights: the formula of an update, its warm-up, and what an average leaves alone."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shortcutflow as sf
from shortcutflow.ema import EMA, AnyEMAConfig, EMAConfig, PowerFunctionEMAConfig, gamma_of
from tests.processes import run_forked


def network(seed: int) -> nn.Sequential:
    """Parameters of several shapes, and the floating and counting buffers of a batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def moved(net: nn.Sequential, seed: int) -> nn.Sequential:
    """The same network after a large step, its buffers moved as well."""
    other = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    other.train()(torch.randn(16, 4, generator=generator))
    return other


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_update(decay: float) -> None:
    """average <- decay average + (1 - decay) weights, over several steps."""
    net = network(0)
    average = sf.EMA(net, sf.EMAConfig(decay=decay, warm_up=False))
    by_hand, exchanged = weights(net).double(), weights(net).double()
    for step in range(4):
        net = moved(net, step)
        average.update(net, step)
        by_hand = decay * by_hand + (1 - decay) * weights(net).double()
        exchanged = (1 - decay) * exchanged + decay * weights(net).double()
    assert (weights(average.network) - by_hand).abs().max() < 1e-6
    if decay != 0.5:  # the only decay at which both are the same
        assert (weights(average.network) - exchanged).abs().max() > 1e-2


def test_warm_up_values() -> None:
    """(1 + i)/(10 + i) until that exceeds the decay: from 0.1 at the first update to 0.999 at the 8990th."""
    config = sf.EMAConfig(decay=0.999)
    assert config.warm_up
    assert [config.decay_at(i) for i in (0, 1, 8, 90)] == pytest.approx([1 / 10, 2 / 11, 9 / 18, 91 / 100])
    values = [config.decay_at(i) for i in range(10_000)]
    assert values == sorted(values)
    assert values.index(0.999) == 8990
    assert values[-1] == 0.999
    assert {sf.EMAConfig(decay=0.999, warm_up=False).decay_at(i) for i in (0, 1, 10_000)} == {0.999}


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (10**6, 0.999)])
def test_update_uses_the_decay_of_its_step(step: int, decay: float) -> None:
    start = network(0)
    average, net = sf.EMA(start), moved(start, 1)
    average.update(net, step)
    expected = decay * weights(start) + (1 - decay) * weights(net)
    assert (weights(average.network) - expected).abs().max() < 1e-6
    late = sf.EMA(start)
    late.update(net, step + 5)
    assert ((weights(late.network) - expected).abs().max() > 1e-3) == (step < 10**6)


@pytest.mark.parametrize(
    "config",
    [None, sf.EMAConfig(decay=0.999, warm_up=False), sf.EMAConfig(decay=0.3), PowerFunctionEMAConfig()],
    ids=["default", "slow", "fast", "power"],
)
def test_a_network_that_stands_still_is_its_own_average(config: AnyEMAConfig | None) -> None:
    net = network(0)
    average = sf.EMA(net, config)
    for step in range(50):
        average.update(net, step)
    assert torch.equal(weights(average.network), weights(net))
    average.update(moved(net, 1), 50)
    assert not torch.equal(weights(average.network), weights(net))


def test_buffers_are_copied() -> None:
    net = network(0)
    average, net = sf.EMA(net, sf.EMAConfig(decay=0.9, warm_up=False)), moved(net, 1)
    before = {name: value.clone() for name, value in average.network.named_buffers()}
    average.update(net, 0)
    theirs = dict(net.named_buffers())
    assert {"1.running_mean", "1.num_batches_tracked"} <= theirs.keys()
    for name, value in average.network.named_buffers():
        assert torch.equal(value, theirs[name]), name
        assert not torch.equal(value, before[name]), name
        assert value.data_ptr() != theirs[name].data_ptr(), name


def test_average_is_free_of_gradients_and_evaluates() -> None:
    net = network(0).train()
    average = sf.EMA(net)
    assert not any(p.requires_grad for p in average.network.parameters())
    assert not any(module.training for module in average.network.modules())
    assert not average.network(torch.ones(3, 4)).requires_grad
    average.update(moved(net, 1), 0)
    assert all(p.grad_fn is None and not p.requires_grad for p in average.network.parameters())


def test_the_network_itself_is_left_alone() -> None:
    net = network(0).train()
    before = copy.deepcopy(net.state_dict())
    average = sf.EMA(net)
    average.update(moved(net, 1), 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert not torch.equal(weights(average.network), weights(net)), "the average shares no storage with it"


def test_averages_of_several_decays_side_by_side() -> None:
    """The faster one is nearer to where the network went."""
    net = network(0)
    slow, fast = (sf.EMA(net, sf.EMAConfig(decay=decay, warm_up=False)) for decay in (0.99, 0.5))
    net = moved(net, 1)
    for average in (slow, fast):
        average.update(net, 0)
    distances = [float((weights(average.network) - weights(net)).norm()) for average in (slow, fast)]
    assert distances[0] / distances[1] == pytest.approx(0.99 / 0.5, rel=1e-3)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"rate": 0.9}], ids=str)
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        sf.EMAConfig(**settings)


def average_of_walk(config: AnyEMAConfig, path: Tensor) -> Tensor:
    """The average after each of the path's weights (steps, 3) was reached in turn, from a start at 100."""
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(net.weight, 100)
    average = sf.EMA(net, config)
    for step, value in enumerate(path):
        net.weight.data.copy_(value[None])
        average.update(net, step)
    return weights(average.network)


def walk(steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, 3, generator=generator, dtype=torch.float64).cumsum(0)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_exponential_average_in_closed_form(steps: int) -> None:
    """decay^n start + (1 - decay) sum of decay^(n - 1 - i) weights_i."""
    path, decay = walk(steps), 0.9
    factors = (1 - decay) * decay ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    found = average_of_walk(sf.EMAConfig(decay=decay, warm_up=False), path)
    assert torch.allclose(found, decay**steps * 100 + factors @ path, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 50, 400])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.28])
def test_power_average_is_the_sum_with_power_weights(sigma_rel: float, steps: int) -> None:
    """Step i counts by the integral of the profile i^gamma over [i - 1, i]; the start at 100 not at all."""
    path, n = walk(steps), gamma_of(sigma_rel) + 1
    ends = torch.arange(steps + 1, dtype=torch.float64) / steps
    found = average_of_walk(PowerFunctionEMAConfig(sigma_rel=sigma_rel), path)
    assert torch.allclose(found, (ends**n).diff() @ path, rtol=1e-9, atol=1e-9)
    if steps > 2:
        other = (ends ** (n + 1)).diff() @ path
        assert not torch.allclose(found, other, rtol=1e-3), "another power is told apart"


@pytest.mark.parametrize("sigma_rel", [0.001, 0.05, 0.1, 0.2, 0.28])
def test_relative_width_is_the_standard_deviation(sigma_rel: float) -> None:
    """Of the density proportional to i^gamma on [0, 1], measured on a fine grid."""
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = x ** gamma_of(sigma_rel)
    mean = (p * x).sum() / p.sum()
    deviation = ((p * (x - mean) ** 2).sum() / p.sum()).sqrt()
    assert float(deviation) == pytest.approx(sigma_rel, rel=1e-4)


def test_first_power_update_takes_the_weights() -> None:
    config = PowerFunctionEMAConfig(sigma_rel=0.1)
    assert config.decay_at(0) == 0
    values = [config.decay_at(i) for i in range(1000)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx((999 / 1000) ** 7.937203937609809)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, sf.EMAConfig()),
        ({"decay": 0.9}, sf.EMAConfig(decay=0.9)),
        ({"warm_up": False}, sf.EMAConfig(warm_up=False)),
        ({"sigma_rel": 0.06}, PowerFunctionEMAConfig(sigma_rel=0.06)),
        ({"snapshot_every": 100}, PowerFunctionEMAConfig(snapshot_every=100)),
        ({"kind": "power"}, PowerFunctionEMAConfig()),
        ({"kind": "exponential", "decay": 0.5}, sf.EMAConfig(decay=0.5)),
    ],
    ids=str,
)
def test_kinds_are_told_apart(given: dict[str, Any], expected: AnyEMAConfig) -> None:
    """Also without their kind, as older configs are; and they survive JSON."""
    adapter: TypeAdapter[AnyEMAConfig] = TypeAdapter(AnyEMAConfig)
    found = adapter.validate_python(given)
    assert found == expected
    assert type(found) is type(expected)
    assert adapter.validate_json(adapter.dump_json(found)) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"decay": 0.9, "sigma_rel": 0.05},
        {"kind": "power", "decay": 0.9},
        {"kind": "cosine"},
        {"sigma_rel": 0.0},
        {"sigma_rel": 0.29},
        {"snapshot_every": -1},
    ],
    ids=str,
)
def test_mixtures_and_impossible_widths_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(reversed(given))):
        TypeAdapter(AnyEMAConfig).validate_python(given)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29])
def test_a_width_without_a_power_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887.*got " + str(sigma_rel)):
        gamma_of(sigma_rel)


def train_sharded(folder: Path) -> None:
    """Three steps of a sharded network with a sharded average, and the same on one process, compared."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    net = copy.deepcopy(whole)
    config = PowerFunctionEMAConfig(sigma_rel=0.15)
    expected, average = sf.EMA(whole, config), sf.EMA(net, config)
    for sharded in (net, average.network):
        fully_shard(sharded[0], mesh=init_device_mesh("cpu", (2,)))  # type: ignore[index]
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (net, whole)]
    problems = []
    for step in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for n, a, optimizer in zip((net, whole), (average, expected), optimizers, strict=True):
            with torch.no_grad():
                target = a.network(x) + 1
            n(x).sub(target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if all(isinstance(p, DTensor) for p in average.network.parameters()):
            problems.append("the target's pass left nothing gathered: this test tests nothing")
        average.update(net, step)
        expected.update(whole, step)
        with torch.no_grad():
            if not torch.allclose(average.network(x), expected.network(x), atol=1e-6):
                problems.append(f"step {step}: the average's output is of other weights")
    for (name, p), q in zip(average.network.state_dict().items(), expected.network.state_dict().values(), strict=True):
        if not torch.allclose(p.full_tensor(), q, atol=1e-6):
            problems.append(f"{name} is off by {(p.full_tensor() - q).abs().max():g}")
    (folder / f"{dist.get_rank()}.txt").write_text("\n".join(problems))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the threads of gloo now and then abort an orderly exit, when all is done


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without distributed")
def test_sharded_average_equals_whole(tmp_path: Path) -> None:
    done = run_forked(train_sharded, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text() == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", [EMAConfig(decay=0.999, warm_up=False), PowerFunctionEMAConfig(sigma_rel=0.05)])
def test_averages_of_16_bits_move_as_far_as_those_of_32(config: Any, dtype: torch.dtype) -> None:
    """A thousandth of the way is less than 16 bits resolve: added there it would be rounded off each time."""
    net = nn.Linear(3, 3).to(dtype)
    average, expected = EMA(net, config), 1.0
    with torch.no_grad():
        average.network.weight.fill_(1.0)
        net.weight.fill_(2.0)
    for step in range(5000, 6000):
        average.update(net, step)
        expected += (1 - config.decay_at(step)) * (2.0 - expected)
    assert 1.5 < expected < 2
    assert average.network.weight.dtype == dtype
    assert (average.network.weight.float() - expected).abs().max() < 0.008
