"""Every name that is known: it can be built without memory, has its size, and counts its operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import backbones
from backbones.backbone import Backbone
from backbones.tokens import TokenNetwork
from tests.backbones_contract.cases import TINY, family_of, third_party_installed

LATENT, TRAJECTORY = (4, 32, 32), (16, 2)

with third_party_installed():
    NAMES = backbones.names()


def on_meta(name: str, num_classes: int | None = 1000, **options: object) -> nn.Module:
    """The network without memory: its sizes can be counted, its numbers are none."""
    required = TINY[family_of(name)].requires if family_of(name) in TINY else None
    if required is not None:
        pytest.importorskip(required)
    shape = TRAJECTORY if family_of(name) == "unet1d" else LATENT
    with torch.device("meta"):
        return backbones.create(name, shape=shape, num_classes=num_classes, **options)


def parameters_of(name: str, **options: object) -> int:
    return sum(p.numel() for p in on_meta(name, **options).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_built_and_counted(name: str) -> None:
    net = on_meta(name)
    assert all(tensor.is_meta for tensor in [*net.parameters(), *net.buffers()])
    assert isinstance(net, Backbone) or family_of(name) not in TINY
    if isinstance(net, Backbone):
        if isinstance(net, TokenNetwork):
            net.blocks = net.blocks[:1]  # all alike, and a second each to count
        assert net.flops() > 0


MILLIONS = {
    "diffusers_unet": 275.99,
    "dit_s_2": 33.11,
    "dit_b_2": 131.09,
    "dit_l_2": 459.14,
    "dit_xl_2": 676.44,
    "lstm_s_2": 36.66,
    "lstm_b_2": 145.28,
    "mamba_s_2": 38.52,
    "mamba_b_2": 150.78,
    "transformer_s_2": 29.53,
    "transformer_b_2": 116.86,
    "unet_cifar": 39.28,
    "unet_s": 17.05,
    "unet_b": 103.28,
    "unet1d_policy": 145.32,
}
"""Parameters for latents of 4x32x32, or trajectories of 16x2, and 1000 classes; of each family at least one."""


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_of_presets(name: str) -> None:
    assert parameters_of(name) / 1e6 == pytest.approx(MILLIONS[name], abs=0.005)


def test_every_family_has_a_pinned_size() -> None:
    families = {family_of(name) for name in backbones.BUILDERS}
    assert {family_of(name) for name in MILLIONS} == families


def test_dit_is_the_released_network() -> None:
    assert parameters_of("dit_b_2", released=True) == 131_091_728
    # 256 log-variances that nothing reads are the released code's own.
    assert parameters_of("dit_b_2") == 131_091_728 - 256
    assert parameters_of("dit_b_2", released=True, ignore_step_size=True) == 131_091_728
    assert parameters_of("dit_b_4", released=True) != 131_091_728


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_dit_has_nearly_the_sizes_of_its_paper(size: str, millions: int) -> None:
    """A second embedding of a scalar comes on top here, a doubled output there."""
    assert MILLIONS[f"dit_{size}_2"] == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("dit", ("s", "b", "l", "xl")), ("lstm", ("s", "b")), ("mamba", ("s", "b")), ("transformer", ("s", "b"))],
)
def test_names_say_size_and_patch(family: str, sizes: tuple[str, ...]) -> None:
    with_patch = [f"{family}_{size}_{patch}" for size in sizes for patch in (2, 4, 8)]
    expected = {family, *(f"{family}_{size}" for size in sizes), *with_patch}
    assert {name for name in NAMES if family_of(name) == family} == expected
    for name in with_patch:
        net, patch = on_meta(name, depth=1), int(name.split("_")[-1])
        assert net.get_parameter("head.out.weight").shape[0] == 4 * patch**2
        assert len(net.get_buffer("positions")) == (32 // patch) ** 2
