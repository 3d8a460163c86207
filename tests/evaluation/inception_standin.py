"""A small network with the parts, names and calls of the published Inception file, so that its users run without it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """Two branches side by side, the first of them named conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 9, 1), nn.ReLU())
        self.tower = nn.Sequential(nn.Conv2d(8, 119, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], dim=1)


class InceptionStandIn(nn.Module):
    """Pictures (b, 3, h, w) in [0, 255], resized as TensorFlow 1 does, to 2048 features or to probabilities."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first = nn.Conv2d(3, 8, 9, stride=18)
            self.layers = nn.Sequential(
                OrderedDict(conv=first, act=nn.ReLU(), mixed_6=Mixed(), pool2=nn.AdaptiveAvgPool2d(4))
            )
            self.output = nn.Linear(2048, 12)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        b, _, h, w = img.shape
        # Its own way, by coordinates, so that it checks the library's, which is by lines.
        rows = (2 * torch.arange(299, device=img.device) * (h / 299) + 1) / h - 1
        columns = (2 * torch.arange(299, device=img.device) * (w / 299) + 1) / w - 1
        grid = torch.stack([columns.view(1, 299).expand(299, 299), rows.view(299, 1).expand(299, 299)], dim=2)
        x = nn.functional.grid_sample(
            img.float(), grid.unsqueeze(0).expand(b, 299, 299, 2).to(torch.float32), "bilinear", "border", False
        )
        features = self.layers((x - 128) / 128).reshape(b, 2048)
        if return_features:
            return features
        return self.output(features).softmax(1)


def save_torchscript(network: nn.Module, path: Path) -> Path:
    """Write a network as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network.eval()), str(path))
    return path
