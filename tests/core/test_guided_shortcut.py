"""Guidance as an input: targets in closed form, the same scale at every step size, one call when sampling.

The network is x_t / 2 + null + w (y - null): what guidance of scale w makes of x_t / 2 + y.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import backbones
import shortcutflow as sf
from shortcutflow.guidance import with_scale
from shortcutflow.objectives import Context, Draw, GuidedShortcutObjective
from shortcutflow.path import expand_to
from shortcutflow.types import BatchSlice, Targets
from tests.core.networks import Recorder

NULL = -2.0
M = 8


def guided_net(x_t: Tensor, t: Tensor, d: Tensor, y: Any, /) -> Tensor:
    return 0.5 * x_t + expand_to(NULL + y["guidance"] * (y["y"] - NULL), x_t)


def case(objective: GuidedShortcutObjective, generator: Generator) -> tuple[Targets, Draw, Tensor]:
    """Targets of 64 samples with conditions 0, 1, 2, the draw, and x_1 - x_0."""
    data, y = torch.randn(64, 2, generator=generator), (torch.arange(64) % 3).float()
    draw = objective.draw(data, generator)
    return objective.targets(guided_net, data, y, draw, Context(null_y=NULL)), draw, data - draw.noise


def expected(targets: Targets, v: Tensor, w: Tensor, guided_from: float = 0.0) -> Tensor:
    """Flow rows guided by w after a time, bootstrap rows as two half steps of scale w."""
    n, y = targets.n_bootstrap, targets.y["y"]
    flow = v + expand_to((w - 1) * (y - NULL) * (targets.t >= guided_from), v)
    half = targets.d[:, None] / 2

    def step(x: Tensor) -> Tensor:
        return 0.5 * x + expand_to(NULL + w * (y - NULL), x)

    v1 = step(targets.x_t)
    v2 = step(targets.x_t + half * v1)
    return torch.cat([((v1 + v2) / 2)[:n], flow[n:]])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("guided_from", [0.0, 0.4])
def test_targets_are_those_of_their_scale(dropout: float, guided_from: float, generator: Generator) -> None:
    objective = GuidedShortcutObjective(finest_steps=M, condition_dropout=dropout, guided_from=guided_from)
    targets, draw, v = case(objective, generator)
    w = targets.y["guidance"]
    assert torch.allclose(targets.v, expected(targets, v, w, guided_from), atol=1e-5)
    assert not torch.allclose(targets.v, expected(targets, v, w + 1, guided_from), atol=1e-2), (
        "the other convention of w"
    )
    assert not torch.allclose(targets.v, expected(targets, v, w, 1.0), atol=1e-2), "never guided"
    assert draw.scale is not None
    dropped = draw.dropped
    assert torch.equal(w[~dropped], draw.scale[~dropped])
    assert (w[dropped] == 1).all(), "rows without a condition are not guided"
    assert (targets.y["y"][dropped] == NULL).all()


def test_the_share_of_guided_rows(generator: Generator) -> None:
    objective = GuidedShortcutObjective(finest_steps=M, guided_fraction=0.25, max_guidance=3)
    draw = objective.draw(torch.zeros(64, 2), generator)
    assert draw.scale is not None
    assert draw.n_bootstrap == 16
    assert (draw.scale[16:28] > 1).all()
    assert (draw.scale[28:] == 1).all()
    assert draw.max_guided == 28
    many = torch.cat([objective.draw(torch.zeros(64, 2), generator).scale[:16] for _ in range(100)])  # type: ignore[index]
    assert 0.2 < (many > 1).float().mean() < 0.3
    assert many.min() >= 1
    assert 2.9 < many.max() <= 3


def test_slices_draw_what_the_whole_batch_does() -> None:
    objective = GuidedShortcutObjective(finest_steps=M, condition_dropout=0.3)
    data, y = torch.randn(64, 2, generator=Generator().manual_seed(1)), (torch.arange(64) % 3).float()

    def targets(here: BatchSlice) -> Targets:
        context = Context(null_y=NULL, batch_slice=here)
        draw = objective.draw(data[here.rows], Generator().manual_seed(0), context)
        return objective.targets(guided_net, data[here.rows], y[here.rows], draw, context)

    whole = targets(BatchSlice())
    for index in range(4):
        part, rows = targets(BatchSlice(index, 4)), slice(index, None, 4)
        assert torch.equal(part.v, whole.v[rows])
        assert torch.equal(part.y["guidance"], whole.y["guidance"][rows])


def test_the_scale_does_not_compound_over_step_sizes() -> None:
    """Where every condition has one velocity, an exact network is its own target at every size and scale."""
    torch.manual_seed(0)
    y, w = torch.tensor([1.0, 2.0] * 64), 1.5
    noise = torch.randn(128, 2)

    def exact(x_t: Tensor, t: Tensor, d: Tensor, y: Any, /) -> Tensor:
        return expand_to(NULL + y["guidance"] * (y["y"] - NULL), x_t).expand_as(x_t)

    data = noise + y[:, None]  # x_1 - x_0 is y
    objective = GuidedShortcutObjective(finest_steps=128)
    report = objective(exact, data, y, null_y=NULL, noise=noise)
    assert report.loss < 1e-10
    one_step = exact(noise, torch.zeros(128), torch.ones(128), with_scale(y, torch.full((128,), w)))
    assert torch.allclose(one_step, expand_to(NULL + w * (y - NULL), noise).expand_as(noise))
    # Guided anew at each of seven sizes, the difference of conditions grows by w each time.
    guided, null = y.clone(), torch.full_like(y, NULL)
    for _ in range(7):
        guided = null + w * (guided - null)
    assert torch.allclose(guided - null, w**7 * (y - NULL))


def test_sampling_takes_one_call_with_the_scale(generator: Generator) -> None:
    class Net(nn.Module):
        guidance_input = True

        def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
            y = y if isinstance(y, dict) else with_scale(y, torch.ones(len(x_t)))
            return guided_net(x_t, t, d, y)

    class Plain(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
            return 0.5 * x_t + expand_to(y, x_t)

    noise, y = torch.randn(6, 2, generator=generator), torch.arange(6).float()
    for scale in (0.0, 1.0, 2.5):
        net, plain = Recorder(Net()), Recorder(Plain())
        net.guidance_input = True  # type: ignore[attr-defined]
        given = sf.sample(net, noise, y, steps=2, guidance_scale=scale, null_y=NULL)
        assert torch.allclose(given, sf.sample(plain, noise, y, steps=2, guidance_scale=scale, null_y=NULL), atol=1e-5)
        assert [len(call.x_t) for call in net.calls] == [6, 6]
        assert [len(call.x_t) for call in plain.calls] == [12 if scale == 2.5 else 6] * 2


@pytest.mark.parametrize("name", ["dit", "unet", "lstm"])
def test_backbones_embed_the_scale(name: str, generator: Generator) -> None:
    options: dict[str, Any] = (
        {"width": 16, "multipliers": (1, 1), "head_width": 16} if name == "unet" else {"width": 16, "depth": 1}
    )
    if name == "dit":
        options["heads"] = 2
    net = backbones.create(name, shape=(1, 8, 8), num_classes=3, guidance_input=True, **options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x_t, t, d, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.ones(4), torch.arange(4)
    without = net(x_t, t, d, y)
    assert torch.equal(without, net(x_t, t, d, with_scale(y, torch.ones(4)))), "no scale is a scale of 1"
    assert (net(x_t, t, d, with_scale(y, torch.full((4,), 2.0))) - without).abs().max() > 1e-3
    plain = backbones.create(name, shape=(1, 8, 8), num_classes=3, **options)
    with pytest.raises(ValueError, match="build the network with guidance_input"):
        plain(x_t, t, d, with_scale(y, torch.ones(4)))


def test_what_does_not_fit_is_refused(generator: Generator) -> None:
    data = torch.randn(64, 2, generator=generator)
    with pytest.raises(ValueError, match="guides by a condition"):
        GuidedShortcutObjective()(guided_net, data, null_y=NULL)
    with pytest.raises(ValueError, match="need null_y"):
        GuidedShortcutObjective()(guided_net, data, torch.zeros(64))
    with pytest.raises(ValueError, match="guidance_scale is for kind 'shortcut'"):
        GuidedShortcutObjective(guidance_scale=2.0)
    with pytest.raises(ValueError, match="holds no guided row"):
        GuidedShortcutObjective(guided_fraction=0.01).draw(torch.zeros(64, 2), generator)
    with pytest.raises(ValueError, match="takes the guidance scale as an input"):
        GuidedShortcutObjective().wrap(nn.Linear(2, 2))


@pytest.mark.parametrize("first", [None, 1 / 8])
def test_targets_cost_what_they_say(first: float | None, generator: Generator) -> None:
    objective, net = GuidedShortcutObjective(finest_steps=M, first_bootstrap_fraction=first), Recorder(guided_net)
    data = torch.randn(64, 2, generator=generator)
    for step in range(32):
        context = Context(null_y=NULL, progress=(step + 0.5) / 32)
        objective.targets(net, data, torch.zeros(64), objective.draw(data, generator, context), context)
    assert sum(len(call.x_t) for call in net.calls) == objective.target_evaluations(64) * 64 * 32
