"""(f) A video backbone: samples (channels, frames, height, width), digits that move by a pixel a frame."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import backbones
import shortcutflow as sf
from backbones.backbone import Backbone
from backbones.embeddings import Condition
from shortcutflow import network, plugins

# ---- the package


class Block(nn.Module):
    """Convolution over frames and pixels, scaled and shifted by time, step size and label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width, affine=False)
        self.scale_shift = nn.Linear(width, 2 * width)
        self.conv = nn.Conv3d(width, width, 3, padding=1, padding_mode="circular")
        self.mix = nn.Conv3d(width, width, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.scale_shift(c)[:, :, None, None, None].chunk(2, dim=1)
        return x + self.mix(nn.functional.silu(self.conv(self.norm(x) * (1 + scale) + shift)))


class VideoNet(Backbone):
    axes = (4,)

    def __init__(
        self, shape: Sequence[int], num_classes: int | None = None, finest_steps: int = 128, width: int = 32
    ) -> None:
        super().__init__(shape)
        self.condition = Condition(width, num_classes=num_classes, finest_steps=finest_steps)
        self.first, self.last = nn.Conv3d(self.channels, width, 1), nn.Conv3d(width, self.channels, 1)
        self.place = nn.Parameter(0.1 * torch.randn(width, *self.shape[1:]))
        self.blocks = nn.ModuleList([Block(width) for _ in range(4)])

    def _predict(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.first(x) + self.place
        for block in self.blocks:
            x = self.run(block, x, c)
        return self.last(x)

    def shard_plan(self) -> list[nn.Module]:
        return list(self.blocks)


BUILDERS = {"video": VideoNet}

# ---- what is checked


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed, with its entry point."""
    entry = EntryPoint("video", f"{__name__}:BUILDERS", "shortcutflow.backbones")
    for module in (backbones.registry, plugins):
        others = list(module.entry_points(group="shortcutflow.backbones"))
        monkeypatch.setattr(module, "entry_points", lambda group, others=others: [*others, entry])


def moving_digits() -> Tensor:
    """(1797, 1, 4, 8, 8): digits that go down by a pixel a frame, round and round."""
    images = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().images, dtype=torch.float32) / 8 - 1
    return torch.stack([images.roll(k, dims=1) for k in range(4)], dim=1)[:, None]


def motion(video: Tensor, pixels: int) -> float:
    """Root mean square of a frame minus the frame before moved by so many pixels."""
    return float((video[:, :, 1:] - video[:, :, :-1].roll(pixels, dims=3)).square().mean().sqrt())


@pytest.mark.slow
def test_samples_move_as_the_data_does() -> None:
    torch.manual_seed(0)
    data, generator = moving_digits(), Generator().manual_seed(0)
    config = network.BackboneConfig(name="video", options={"width": 32})
    net: Any = network.build_network(config, shape=(1, 4, 8, 8), num_classes=None, finest_steps=128, seed=0)
    assert net.flops() > 1e6
    objective, ema = sf.ShortcutObjective(), sf.EMA(net, sf.EMAConfig(decay=0.95))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(300):
        rows = torch.randint(len(data), (32,), generator=generator)
        objective(net, data[rows], target_net=ema.network, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(net, step)
    assert motion(data, 1) == 0
    samples = sf.sample(ema.network, (64, 1, 4, 8, 8), steps=4, generator=Generator().manual_seed(1))
    assert samples.shape == (64, 1, 4, 8, 8)
    assert motion(samples, 1) < 0.5 * min(motion(samples, pixels) for pixels in (-1, 0, 2))


@pytest.mark.parametrize("shape", [(1, 4, 8, 7), (4, 8, 8)])
def test_other_videos_are_refused(shape: tuple[int, ...]) -> None:
    net = backbones.create("video", shape=(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(batch, 1, 4, 8, 8\)"):
        net(torch.zeros(2, *shape), torch.zeros(2), torch.ones(2))
