"""ShortcutObjective.released: its order of rows, its reuse of the first images, and its other habits, as documented."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import shortcutflow as sf
from shortcutflow.objectives import Context, Draw
from shortcutflow.objectives.released import draw_shortcut_rows
from shortcutflow.types import Targets
from tests.core.networks import Recorder, affine, zero

BATCH, NULL = 80, 10


def case(generator: Generator, **switches: object) -> tuple[Targets, Draw, Tensor, Recorder]:
    """Targets of 80 samples, of which 10 make bootstrap rows at the default switches."""
    objective = sf.ShortcutObjective.released(**switches)  # type: ignore[arg-type]
    data, net = torch.randn(BATCH, 3, generator=generator), Recorder(affine)
    draw = objective.draw(data, generator=generator)
    return objective.targets(net, data, torch.zeros(BATCH).long(), draw, Context(null_y=NULL)), draw, data, net


def test_switches_become_settings() -> None:
    objective = sf.ShortcutObjective.released(
        denoise_timesteps=64, bootstrap_every=4, bootstrap_cfg=True, cfg_scale=2.5, class_dropout_prob=0.2
    )
    assert objective == sf.ShortcutObjective(
        finest_steps=64,
        bootstrap_fraction=0.25,
        guidance_scale=2.5,
        condition_dropout=0.2,
        clip=4.0,
        sigma_min=1e-5,
        rows="released",
    )
    assert objective != sf.ShortcutObjective.released(denoise_timesteps=64, bootstrap_every=4)
    assert sf.ShortcutObjective.released(cfg_scale=2.5).guidance_scale == 1, "the scale counts with bootstrap_cfg only"
    assert sf.ShortcutObjective.released(bootstrap_dt_bias=True).rows == "released_dt_bias"
    assert sf.FlowMatchingObjective.released(64, 0.2) == sf.FlowMatchingObjective(
        time_steps=64, condition_dropout=0.2, sigma_min=1e-5
    )


def test_order_of_rows_and_remainder_at_one(generator: Generator) -> None:
    """Ten rows over seven sizes: one of each, finest first, and the three left over at d = 1; then the flow rows."""
    targets, _, _, _ = case(generator)
    assert targets.n_bootstrap == 10
    assert targets.d.tolist() == [2.0**-k for k in range(6, -1, -1)] + [1.0] * 3 + [1 / 128] * 70
    assert ((targets.t / targets.d) % 1 == 0).all()
    assert (targets.t < 1).all()


def test_fewer_rows_than_sizes_are_all_at_one(generator: Generator) -> None:
    targets, _, _, _ = case(generator, bootstrap_every=16)
    assert targets.d[: targets.n_bootstrap].tolist() == [1.0] * 5


def test_biased_sizes(generator: Generator) -> None:
    """Forty rows: two each of the five finest sizes, ten of 1/2, ten of 1, and the ten left over at 1 as well."""
    targets, _, _, _ = case(generator, bootstrap_every=2, bootstrap_dt_bias=True)
    sizes = [2.0**-k for k in (6, 6, 5, 5, 4, 4, 3, 3, 2, 2)] + [0.5] * 10 + [1.0] * 20
    assert targets.d[: targets.n_bootstrap].tolist() == sizes
    even, _, _, _ = case(generator, bootstrap_every=2)
    assert even.d[: even.n_bootstrap].tolist() == [2.0**-k for k in range(6, -1, -1) for _ in range(5)] + [1.0] * 5


def test_flow_rows_use_the_first_images_again(generator: Generator) -> None:
    targets, draw, data, _ = case(generator)
    assert draw.source is not None
    assert draw.source.tolist() == [*range(10), *range(70)]
    t = targets.t[:, None]
    own = (1 - (1 - 1e-5) * t) * draw.noise + t * data[draw.source]
    in_order = (1 - (1 - 1e-5) * t) * draw.noise + t * data
    torch.testing.assert_close(targets.x_t, own)
    assert not torch.allclose(targets.x_t, in_order)


def test_a_little_noise_is_left_at_the_end(generator: Generator) -> None:
    targets, draw, data, _ = case(generator)
    released, exact = (data[:70] - share * draw.noise[10:] for share in (1 - 1e-5, 1))
    assert (targets.v[10:] - released).abs().max() < 1e-6
    assert (targets.v[10:] - exact).abs().max() > 1e-6


def test_bootstrap_rows_keep_their_labels(generator: Generator) -> None:
    targets, draw, _, net = case(generator, class_dropout_prob=1.0)
    assert targets.y is not None
    assert (targets.y[:10] == 0).all()
    assert (targets.y[10:] == NULL).all()
    assert not draw.dropped[:10].any()
    assert all(call.y is not None and (call.y == 0).all() for call in net.calls)


@pytest.mark.parametrize(
    ("switches", "guided"),
    [
        ({}, 1),
        ({"bootstrap_every": 2}, 5),
        ({"bootstrap_every": 2, "bootstrap_dt_bias": True}, 2),
        ({"bootstrap_every": 16}, 0),
    ],
    ids=str,
)
def test_guidance_of_the_finest_rows(switches: dict[str, object], guided: int, generator: Generator) -> None:
    targets, draw, _, net = case(generator, bootstrap_cfg=True, **switches)
    n = targets.n_bootstrap
    assert draw.guided is None, "all that may be"
    assert draw.max_guided == guided
    assert [len(call.x_t) for call in net.calls] == [n + guided] * 2
    assert (targets.d[:guided] == 2 / 128).all()
    assert not (targets.d[guided:n] == 2 / 128).any()
    unguided, _, _, net = case(generator, **switches)
    assert [len(call.x_t) for call in net.calls] == [unguided.n_bootstrap] * 2


def test_clip_at_four(generator: Generator) -> None:
    objective = sf.ShortcutObjective.released(class_dropout_prob=0)
    data = torch.randn(BATCH, 3, generator=generator)
    draw = objective.draw(data, generator=generator)
    net = Recorder(lambda x, t, d, y: 100 * affine(x, t, d, y))
    targets = objective.targets(net, data, None, draw)
    assert targets.v[:10].abs().max() == 4
    assert net.calls[1].x_t.abs().max() == 4
    assert objective.model_copy(update={"clip": None}).targets(net, data, None, draw).v[:10].abs().max() > 4


@pytest.mark.parametrize(("force_t", "force_d"), [(0.25, None), (None, 0.5), (0.5, 0.25), (None, None)])
def test_forced_times_and_sizes(force_t: float | None, force_d: float | None, generator: Generator) -> None:
    objective = sf.ShortcutObjective.released(class_dropout_prob=0)
    data = torch.randn(BATCH, 3, generator=generator)
    draw = draw_shortcut_rows(
        data, objective.n_bootstrap(BATCH), generator,
        finest_steps=128, condition_dropout=0, force_t=force_t, force_d=force_d,
    )  # fmt: skip
    targets = objective.targets(zero, data, None, draw)
    times, sizes = set(targets.t.tolist()), set(targets.d[:10].tolist())
    assert times == {force_t} if force_t is not None else len(times) > 2
    assert sizes == {force_d} if force_d is not None else len(sizes) == 7
    assert (targets.d[10:] == 1 / 128).all()
