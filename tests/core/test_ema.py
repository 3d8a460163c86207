"""Averages of the weights: the formula of an update, its warm-up, and what an average leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import shortcutflow as sf


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
    average = sf.Average(net, sf.AverageConfig(decay=decay, warm_up=False))
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
    config = sf.AverageConfig(decay=0.999)
    assert config.warm_up
    assert [config.decay_at(i) for i in (0, 1, 8, 90)] == pytest.approx([1 / 10, 2 / 11, 9 / 18, 91 / 100])
    values = [config.decay_at(i) for i in range(10_000)]
    assert values == sorted(values)
    assert values.index(0.999) == 8990
    assert values[-1] == 0.999
    assert {sf.AverageConfig(decay=0.999, warm_up=False).decay_at(i) for i in (0, 1, 10_000)} == {0.999}


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (10**6, 0.999)])
def test_update_uses_the_decay_of_its_step(step: int, decay: float) -> None:
    start = network(0)
    average, net = sf.Average(start), moved(start, 1)
    average.update(net, step)
    expected = decay * weights(start) + (1 - decay) * weights(net)
    assert (weights(average.network) - expected).abs().max() < 1e-6
    late = sf.Average(start)
    late.update(net, step + 5)
    assert ((weights(late.network) - expected).abs().max() > 1e-3) == (step < 10**6)


@pytest.mark.parametrize("config", [None, sf.AverageConfig(decay=0.999, warm_up=False), sf.AverageConfig(decay=0.3)])
def test_a_network_that_stands_still_is_its_own_average(config: sf.AverageConfig | None) -> None:
    net = network(0)
    average = sf.Average(net, config)
    for step in range(50):
        average.update(net, step)
    assert torch.equal(weights(average.network), weights(net))
    average.update(moved(net, 1), 50)
    assert not torch.equal(weights(average.network), weights(net))


def test_buffers_are_copied() -> None:
    net = network(0)
    average, net = sf.Average(net, sf.AverageConfig(decay=0.9, warm_up=False)), moved(net, 1)
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
    average = sf.Average(net)
    assert not any(p.requires_grad for p in average.network.parameters())
    assert not any(module.training for module in average.network.modules())
    assert not average.network(torch.ones(3, 4)).requires_grad
    average.update(moved(net, 1), 0)
    assert all(p.grad_fn is None and not p.requires_grad for p in average.network.parameters())


def test_the_network_itself_is_left_alone() -> None:
    net = network(0).train()
    before = copy.deepcopy(net.state_dict())
    average = sf.Average(net)
    average.update(moved(net, 1), 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert not torch.equal(weights(average.network), weights(net)), "the average shares no storage with it"


def test_averages_of_several_decays_side_by_side() -> None:
    """The faster one is nearer to where the network went."""
    net = network(0)
    slow, fast = (sf.Average(net, sf.AverageConfig(decay=decay, warm_up=False)) for decay in (0.99, 0.5))
    net = moved(net, 1)
    for average in (slow, fast):
        average.update(net, 0)
    distances = [float((weights(average.network) - weights(net)).norm()) for average in (slow, fast)]
    assert distances[0] / distances[1] == pytest.approx(0.99 / 0.5, rel=1e-3)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"rate": 0.9}], ids=str)
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        sf.AverageConfig(**settings)
