"""A network as another package may bring it: of PyTorch alone, with what the contract demands of any network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Two convolutions, modulated between them by t, d and y; for images and for sequences of any length."""

    def __init__(
        self, *, shape: Sequence[int], num_classes: int | None = None, finest_steps: int = 128, width: int = 32
    ) -> None:
        super().__init__()
        if len(shape) not in (2, 3):
            raise ValueError(f"shape must be (channels, height, width) or (length, channels), got {tuple(shape)}")
        self.shape, self.num_classes, self.finest_steps = tuple(shape), num_classes, finest_steps
        self.is_image = len(shape) == 3
        conv, channels = (nn.Conv2d, shape[0]) if self.is_image else (nn.Conv1d, shape[1])
        self.time, self.step = (
            nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 2 * width)) for _ in range(2)
        )
        self.label = nn.Embedding(num_classes + 1, 2 * width) if num_classes is not None else None
        self.conv_in, self.conv_out = conv(channels, width, 3, padding=1), conv(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None = None) -> Tensor:
        self.check(x_t, t, d, y)
        # In bfloat16 a time of 511/512 would be 1.
        with torch.autocast(x_t.device.type, enabled=False):
            level = -torch.log2(d.float().clamp(min=1 / self.finest_steps))
            c = self.time(waves(1000 * t.float())) + self.step(waves(level))
            if self.label is not None:
                c = c + self.label(torch.full((len(t),), self.num_classes, device=t.device) if y is None else y)
        scale, shift = c.view(len(c), -1, *(1,) * (len(self.shape) - 1)).chunk(2, dim=1)
        h = self.conv_in(x_t if self.is_image else x_t.mT)
        v = self.conv_out(F.silu(h * (1 + scale) + shift))
        return v if self.is_image else v.mT

    def check(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> None:
        """Refuse what does not fit, rather than broadcast it or look up another row of a table."""
        sizes = self.shape if self.is_image else self.shape[1:]
        if x_t.ndim != len(self.shape) + 1 or x_t.shape[x_t.ndim - len(sizes) :] != sizes:
            raise ValueError(f"x_t must be a batch of {self.shape}, got {tuple(x_t.shape)}")
        for name, value in (("t", t), ("d", d)):
            if value.shape != (len(x_t),) or not ((value >= 0) & (value <= 1)).all():
                raise ValueError(f"{name} must be {len(x_t)} numbers in [0, 1], got {value}")
        if y is None:
            return
        if self.num_classes is None:
            raise ValueError("y must be None for a network without labels")
        if y.shape != (len(x_t),) or y.is_floating_point() or y.min() < 0 or y.max() > self.num_classes:
            raise ValueError(f"y must be {len(x_t)} labels in 0 ... {self.num_classes}, got {y}")


def waves(value: Tensor) -> Tensor:
    """(b,) to (b, 64): cosines and sines of 32 frequencies."""
    angle = value[:, None] * 10000 ** (-torch.arange(32, device=value.device) / 32)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


BUILDERS = {"thirdparty_conv": ConvNet}
