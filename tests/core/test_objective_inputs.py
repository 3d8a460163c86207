"""Input that an objective cannot use: a ValueError whose text names what was given, and never a silent answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import shortcutflow as sf
from shortcutflow import objectives
from shortcutflow.objectives import Context
from tests.core.networks import affine, zero

KINDS: dict[str, Any] = {
    "shortcut": sf.ShortcutObjective(),
    "all bootstrap": sf.ShortcutObjective(bootstrap_fraction=1),
    "no bootstrap": sf.ShortcutObjective(bootstrap_fraction=0),
    "released": sf.ShortcutObjective.released(class_dropout_prob=0),
    "flow": sf.FlowMatchingObjective(),
}
every_kind = pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS.keys())


@every_kind
def test_good_input_passes(objective: Any, generator: Generator) -> None:
    """The batch that the tests below break in one place each."""
    data = torch.randn(16, 2, 4, 4, generator=generator)
    draw = objective.draw(data, generator=generator)
    assert objective.targets(zero, data, torch.zeros(16).long(), draw).v.shape == data.shape
    assert objective(affine, data, torch.zeros(16).long(), generator=generator).loss.isfinite()


# ---- size of the batch


@pytest.mark.parametrize(("batch", "fraction"), [(3, 0.25), (7, 0.125), (1, 0.5)])
def test_batch_too_small_names_the_numbers(batch: int, fraction: float, generator: Generator) -> None:
    objective = sf.ShortcutObjective(bootstrap_fraction=fraction)
    with pytest.raises(ValueError, match=f"batch of {batch} holds no bootstrap row") as raised:
        objective(zero, torch.zeros(batch, 2), generator=generator)
    for fact in (f"bootstrap_fraction {fraction:g}", f"at least {int(1 / fraction)} samples", f"at least 1/{batch}"):
        assert fact in str(raised.value)


def test_the_batch_size_it_names_is_the_smallest() -> None:
    named = {}
    for every in range(2, 65):
        objective = sf.ShortcutObjective(bootstrap_fraction=1 / every)
        assert objective.n_bootstrap(every) == 1
        with pytest.raises(ValueError, match="holds no bootstrap row") as raised:
            objective.n_bootstrap(every - 1)
        named[every] = int(re.findall(r"use at least (\d+) samples", str(raised.value))[0])
    assert named == {every: every for every in named}


@pytest.mark.parametrize("every", [1, 2, 3, 4, 6, 7, 8, 10, 12])
def test_number_of_bootstrap_rows_is_rounded_down(every: int) -> None:
    objective = sf.ShortcutObjective(bootstrap_fraction=1 / every)
    sizes = range(every, 300)
    assert [objective.n_bootstrap(b) for b in sizes] == [b // every for b in sizes]
    assert sf.ShortcutObjective(bootstrap_fraction=0).n_bootstrap(1) == 0
    # 100 * 0.29 is 28.999... in floating point.
    assert sf.ShortcutObjective(bootstrap_fraction=0.29).n_bootstrap(100) == 29


# ---- data and conditions


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(16, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(16, 2, dtype=torch.int64),
        torch.zeros(16),
        torch.tensor(1.0),
    ],
    ids=lambda data: f"{data.dtype} {tuple(data.shape)}",
)
@every_kind
def test_data_that_is_no_float_batch(objective: Any, data: Tensor, generator: Generator) -> None:
    with pytest.raises(ValueError, match="data must be a float tensor") as raised:
        objective(zero, data, generator=generator)
    assert f"{data.dtype} {tuple(data.shape)}" in str(raised.value)


@pytest.mark.parametrize("y", [torch.zeros(15).long(), torch.zeros(17, 3), torch.tensor(3)], ids=["15", "17", "none"])
@every_kind
def test_conditions_of_another_length(objective: Any, y: Tensor, generator: Generator) -> None:
    data = torch.zeros(16, 2)
    draw = objective.draw(data, generator=generator)
    calls: list[Callable[[], Any]] = [
        lambda: objective(zero, data, y, generator=generator),
        lambda: objective.targets(zero, data, y, draw),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"data has 16, y has shape " + re.escape(str(tuple(y.shape)))):
            call()


@pytest.mark.parametrize("kind", [sf.ShortcutObjective, sf.FlowMatchingObjective])
def test_dropping_needs_a_null_condition(kind: Any, generator: Generator) -> None:
    with pytest.raises(ValueError, match="null_y: the label"):
        kind(condition_dropout=0.1)(zero, torch.zeros(16, 2), torch.zeros(16).long(), generator=generator)


# ---- draws of one's own


@pytest.mark.parametrize("wrong", [-0.25, 1.5, float("nan")], ids=str)
@every_kind
def test_times_outside_the_unit_interval(objective: Any, wrong: float, generator: Generator) -> None:
    data = torch.zeros(16, 2)
    draw = objective.draw(data, generator=generator)
    t = torch.cat([draw.t[:-1], torch.tensor([wrong])])
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\] .*got values from") as raised:
        objective.targets(zero, data, None, dataclasses.replace(draw, t=t))
    assert f"{wrong:g}" in str(raised.value)


@pytest.mark.parametrize("wrong", [-0.25, 7.0], ids=str)
def test_sizes_outside_the_unit_interval(wrong: float, generator: Generator) -> None:
    """7 is the exponent of 1/128: a caller who passes exponents is told so."""
    objective, data = sf.ShortcutObjective(), torch.zeros(16, 2)
    draw = objective.draw(data, generator=generator)
    with pytest.raises(ValueError, match=r"d must lie in \[0, 1\]") as raised:
        objective.targets(zero, data, None, dataclasses.replace(draw, d=torch.full_like(draw.d, wrong)))
    assert f"{wrong:g}" in str(raised.value)


@every_kind
def test_noise_of_another_shape(objective: Any, generator: Generator) -> None:
    data = torch.zeros(16, 2, 4, 4)
    draw = objective.draw(data, generator=generator)
    other = dataclasses.replace(draw, noise=draw.noise[:, :1])
    with pytest.raises(ValueError, match=r"noise has shape \(16, 1, 4, 4\), data \(16, 2, 4, 4\)"):
        objective.targets(zero, data, None, other)


@every_kind
def test_times_of_another_shape(objective: Any, generator: Generator) -> None:
    data = torch.zeros(16, 2, 4, 4)
    draw = objective.draw(data, generator=generator)
    for t in (draw.t[:15], draw.t[:, None]):
        with pytest.raises(ValueError, match=r"shape \(16,\), got " + re.escape(str(tuple(t.shape)))):
            objective.targets(zero, data, None, dataclasses.replace(draw, t=t))


# ---- networks


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one channel": lambda x: x[:, :1],
    "twice the channels": lambda x: torch.cat([x, x], dim=1),
    "a number a sample": lambda x: x[:, 0, 0, 0],
    "a row less": lambda x: x[:-1],
    "one row": lambda x: x[:1],
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_network_of_another_shape(output: Callable[[Tensor], Tensor], generator: Generator) -> None:
    """Whether it is asked for targets or for the regression; broadcasting must hide none of them."""
    data = torch.randn(16, 2, 4, 4, generator=generator)
    for objective in KINDS.values():
        with pytest.raises(ValueError, match="must return the shape of x_t"):
            objective(lambda x, t, d, y: output(x), data, generator=generator)


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_the_text_names_both_shapes(output: Callable[[Tensor], Tensor], generator: Generator) -> None:
    data = torch.randn(16, 2, 4, 4, generator=generator)
    returned = tuple(output(data).shape)
    for objective in (KINDS["flow"], KINDS["no bootstrap"]):
        with pytest.raises(ValueError, match=re.escape("(16, 2, 4, 4)")) as raised:
            objective(lambda x, t, d, y: output(x), data, generator=generator)
        assert str(returned) in str(raised.value)


# ---- what users have


class Narrow(nn.Module):
    """Refuses, as layers do, what is not of its own precision, and labels that are not int64."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.labels: list[Tensor | None] = []

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        assert x_t.dtype == self.weight.dtype
        assert y is None or y.dtype == torch.int64
        self.labels.append(y)
        return self.weight * x_t


LABELS = [0, 1, 1, 0, 1, 0, 0, 1]
AS_PEOPLE_HAVE_THEM: dict[str, Any] = {
    "list": LABELS,
    "tuple": tuple(LABELS),
    "array": np.array(LABELS),
    "array of bytes": np.array(LABELS, np.uint8),
    "uint8": torch.tensor(LABELS, dtype=torch.uint8),
    "int32": torch.tensor(LABELS, dtype=torch.int32),
    "bool": torch.tensor(LABELS, dtype=torch.bool),
}


@pytest.mark.parametrize("y", AS_PEOPLE_HAVE_THEM.values(), ids=AS_PEOPLE_HAVE_THEM.keys())
def test_labels_of_any_kind_become_int64(y: Any) -> None:
    """Null labels of bytes and of bool would not even fit their type: 300 would wrap, 2 would be true."""
    data, expected = torch.randn(8, 3), torch.tensor(LABELS)
    for objective in (sf.FlowMatchingObjective(condition_dropout=0.5), sf.ShortcutObjective(condition_dropout=0.5)):
        draw = objective.draw(data, generator=Generator().manual_seed(0))
        for report in (
            objective(Narrow(), data, y, null_y=300, generator=Generator().manual_seed(0)).targets,
            objective.targets(Narrow(), data, y, draw, Context(null_y=300)),
        ):
            assert report.y is not None
            assert torch.equal(report.y, torch.where(draw.dropped, 300, expected))
    for sampler in (sf.sample, sf.trajectory):
        net = Narrow()
        sampler(net, data, y, guidance_scale=2, null_y=300)
        assert [label.tolist() for label in net.labels if label is not None] == [LABELS + [300] * 8]


@pytest.mark.parametrize("wrong", [(torch.zeros(8, 2), torch.zeros(8)), ["cat"] * 8, object()])
def test_conditions_that_are_no_tensor(wrong: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: sf.FlowMatchingObjective()(zero, torch.zeros(8, 3), wrong),
        lambda: sf.sample(zero, torch.zeros(8, 3), wrong),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"y must be None or one tensor .* got {type(wrong).__name__}"):
            call()


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_data_and_noise_in_the_precision_of_the_network(given: torch.dtype) -> None:
    """Of a network in 16 bits, which may cast inside, and of a callable, what is given stays."""
    data = torch.randn(8, 3).to(given)
    for own in (torch.float32, torch.float64, torch.bfloat16):
        net = Narrow(own)
        if own == torch.bfloat16 and given != own:
            continue
        assert sf.sample(net, data).dtype == sf.trajectory(net, data).x_t.dtype == own
        for objective in (sf.FlowMatchingObjective(), sf.ShortcutObjective()):
            assert objective(net, data).targets.v.dtype == own
    assert sf.sample(affine, data).dtype == given
    with pytest.raises(ValueError, match=r"got ndarray: use torch\.as_tensor"):
        sf.FlowMatchingObjective()(zero, np.zeros((8, 3)))  # type: ignore[arg-type]


# ---- noise that is given


@pytest.mark.parametrize(
    "objective",
    [
        sf.ShortcutObjective(condition_dropout=0.3),
        sf.FlowMatchingObjective(condition_dropout=0.3),
        objectives.ConsistencyTrainingObjective(),
        objectives.ProgressiveDistillationObjective(),
        objectives.LiveReflowObjective(condition_dropout=0.3),
        objectives.SplitMeanFlowObjective(condition_dropout=0.3),
    ],
    ids=lambda objective: objective.kind,
)
def test_given_noise_is_x_0_and_changes_no_other_number(objective: Any, generator: Generator) -> None:
    data, noise = torch.randn(2, 16, 3, generator=generator).unbind()
    drawn, given = (
        objective.draw(data, Generator().manual_seed(1), Context(progress=0.5, noise=chosen))
        for chosen in (None, noise)
    )
    assert torch.equal(given.noise, noise)
    assert not torch.equal(drawn.noise, noise)
    for field in dataclasses.fields(drawn):
        if field.name != "noise":
            before, after = getattr(drawn, field.name), getattr(given, field.name)
            assert torch.equal(before, after) if isinstance(before, Tensor) else before == after, field.name


def test_given_noise_of_another_shape(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"noise must have the shape of data, \(16, 3\), got \(8, 3\)"):
        sf.FlowMatchingObjective()(affine, torch.zeros(16, 3), noise=torch.zeros(8, 3), generator=generator)


@pytest.mark.parametrize("objective", [sf.ShortcutObjective.released(), objectives.ReflowObjective()])
def test_rows_with_noise_of_their_own_take_none(objective: Any, generator: Generator) -> None:
    data = torch.zeros(16, 3)
    with pytest.raises(ValueError, match="noise of their own: pass no noise=, and in a run use coupling=null"):
        objective.draw(data, generator, Context(noise=data))
