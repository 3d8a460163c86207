"""What the networks of this package promise beyond a call: filled from nothing, checkpointed, cut into units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.backbones_contract.cases import CONDITION, Case, every_backbone
from tests.backbones_contract.compared import assert_equal_training, trained

Spoil = Callable[[Any], None]
CONDITIONS: list[dict[str, Any]] = [{}, {"num_classes": None}, {"num_classes": None, "condition_shape": CONDITION}]


def untouched(net: Any) -> None:
    pass


def add_unused(net: Any) -> None:
    """A parameter and a buffer that reset_parameters knows nothing of."""
    net.unused = nn.Parameter(torch.ones(3))
    net.register_buffer("unseen", torch.ones(3), persistent=False)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


def refilled(net: Any, seed: int = 0) -> dict[str, Tensor]:
    """All parameters and buffers after a reset, copied."""
    torch.manual_seed(seed)
    net.reset_parameters()
    return {name: tensor.detach().clone() for name, tensor in tensors(net).items()}


# ---- reset_parameters


def left_empty(case: Case, spoil: Spoil = untouched, **options: Any) -> list[str]:
    """What of a network that was built without memory is not, after a reset, as it is in an ordinary one."""
    with torch.device("meta"):
        net = case.build(**options)
        spoil(net)
    assert all(tensor.is_meta for tensor in tensors(net).values())
    net.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(net).values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    filled = refilled(net)
    ordinary = case.build(**options)
    spoil(ordinary)
    expected = refilled(ordinary)
    assert filled.keys() == expected.keys()
    return [name for name in filled if not torch.equal(filled[name], expected[name])]


@every_backbone
@pytest.mark.parametrize("options", CONDITIONS, ids=["labels", "no condition", "tensors"])
def test_a_network_without_memory_is_filled_completely(case: Case, options: dict[str, Any]) -> None:
    assert left_empty(case, **options) == []
    assert left_empty(case, add_unused, **options) == ["unused", "unseen"]


@every_backbone
def test_a_filled_network_gives_the_same_output(case: Case) -> None:
    """Also what is neither parameter nor buffer survives: the network computes."""
    with torch.device("meta"):
        net = case.build()
    net.to_empty(device="cpu")
    refilled(net)
    net.load_state_dict(case.awake().state_dict())
    torch.testing.assert_close(net(*case.inputs()), case.awake()(*case.inputs()))


def same_after_a_second_reset(net: Any) -> bool:
    first, second = refilled(net), refilled(net)
    return all(torch.equal(first[name], second[name]) for name in first)


@every_backbone
def test_a_reset_depends_on_the_seed_alone(case: Case) -> None:
    net = case.awake()
    identities = {name: id(p) for name, p in net.named_parameters()}
    assert same_after_a_second_reset(net)
    assert {name: id(p) for name, p in net.named_parameters()} == identities, "parameters are filled in place"
    one, other = refilled(net, seed=0), refilled(net, seed=1)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    # One that keeps something of what was there before.
    reset, parameter = net.reset_parameters, next(p for p in net.parameters() if p.requires_grad)

    def halving() -> None:
        kept = parameter.detach().clone()
        reset()
        parameter.data += kept / 2

    net.reset_parameters = halving
    assert not same_after_a_second_reset(net)


def sizes(case: Case, after_reset: bool, spoil: Spoil = untouched) -> dict[str, tuple[float, float]]:
    """Mean and root mean square of each parameter over several seeds, as built or after a reset."""
    drawn: dict[str, list[Tensor]] = {}
    for seed in range(6):
        net = case.build(seed=seed + 100 * after_reset)
        if after_reset:
            net = case.awake(seed=seed)
            torch.manual_seed(seed)
            net.reset_parameters()
            spoil(net)
        for name, p in net.named_parameters():
            drawn.setdefault(name, []).append(p.detach().flatten())
    joined = {name: torch.cat(values) for name, values in drawn.items()}
    return {name: (float(v.mean()), float(v.square().mean().sqrt())) for name, v in joined.items()}


def started_otherwise(case: Case, spoil: Spoil = untouched) -> list[str]:
    """Parameters that a reset does not draw from the distribution that a new network has them from."""
    built, reset = sizes(case, after_reset=False), sizes(case, after_reset=True, spoil=spoil)
    found = []
    for name, (mean, size) in built.items():
        # Constants, zeros among them, exactly; of the smallest parameter there are some 30 numbers.
        constant = abs(abs(mean) - size) <= 1e-6 * size
        fits = reset[name] == (mean, size) if constant else 0.7 < reset[name][1] / size < 1.4
        if not fits:
            found.append(name)
    return found


@every_backbone
def test_a_reset_network_is_as_a_new_one(case: Case) -> None:
    assert started_otherwise(case) == []
    names = [name for name, _ in case.build().named_parameters()]

    def doubled(net: Any) -> None:
        for p in net.parameters():
            p.data.mul_(2).add_(1e-3)

    assert started_otherwise(case, doubled) == names


# ---- units


def order_of_calls(net: Any, case: Case) -> list[int]:
    """Indices into the shard plan, in the order its units run."""
    calls: list[int] = []
    handles = [
        unit.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, unit in enumerate(net.shard_plan())
    ]
    net(*case.inputs())
    for handle in handles:
        handle.remove()
    return calls


@every_backbone
def test_shard_plan(case: Case) -> None:
    net = case.build()
    units = net.shard_plan()
    assert len(units) >= 2
    assert [id(unit) for unit in net.shard_plan()] == [id(unit) for unit in units]
    assert {id(unit) for unit in units} < {id(module) for module in net.modules()}
    held = [id(p) for unit in units for p in unit.parameters()]
    assert len(held) == len(set(held)), "units share parameters"
    assert len(held) > len(list(net.parameters())) / 2
    in_order = list(range(len(units)))
    assert order_of_calls(net, case) == in_order
    net.shard_plan = lambda: units[::-1]
    assert order_of_calls(net, case) == in_order[::-1]


# ---- gradient checkpoints


def calls_of_units(net: Any, case: Case) -> list[int]:
    """How often each unit of the shard plan runs in a training step."""
    calls = [0] * len(net.shard_plan())

    def count(i: int) -> None:
        calls[i] += 1

    handles = [unit.register_forward_pre_hook(lambda *_, i=i: count(i)) for i, unit in enumerate(net.shard_plan())]
    net(*case.inputs()).square().mean().backward()
    for handle in handles:
        handle.remove()
    return calls


@every_backbone
def test_gradient_checkpoints(case: Case) -> None:
    """The same numbers, each unit run once more in the backward pass, and not at all without one."""
    net = case.awake().train()
    units = len(net.shard_plan())
    assert calls_of_units(net, case) == [1] * units
    expected = trained(net, case)
    net.gradient_checkpointing = True
    assert calls_of_units(net, case) == [2] * units
    out, gradients = trained(net, case)
    assert torch.equal(out, expected[0])
    assert_equal_training((out, gradients), expected, case)
    with torch.no_grad():
        assert order_of_calls(net, case) == list(range(units))
    net.gradient_checkpointing = False
    assert calls_of_units(net, case) == [1] * units
