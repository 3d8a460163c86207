"""Embeddings of time, step size, condition and position, shared by all backbones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def require_positive(**options: int | None) -> None:
    """Raise ValueError naming the option that is below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which operations on the tensor's device keep their precision."""
    # The meta device knows no autocast.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def under_autocast(tensor: Tensor) -> bool:
    """Whether operations on the tensor's device choose their precision by autocast."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


class SinusoidalEmbedding(nn.Module):
    """A scalar a sample as a vector: cosines and sines of many frequencies, then a two-layer MLP.

    Features (cos, sin)(scale value 10000^(-i/128)), i < 128 (as DiT and the released code). Features and MLP
    stay float32 under autocast: bfloat16 cannot tell 511/512 from 1.

    Args:
        width: size of the embedding.
        scale: factor on the value. 1000 spreads t in [0, 1] over the frequencies; the released code has 1.
        features: number of cosines and sines together.
        frequency_shift: s in frequencies 10000^(-i/(128 - s)); 1 in most of diffusers' networks.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1.0, features: int = 256, frequency_shift: int = 0) -> None:
        super().__init__()
        self.scale, self.frequency_shift = scale, frequency_shift
        self.register_buffer("frequencies", torch.empty(features // 2), persistent=False)
        self.hidden = nn.Linear(features, width)
        self.out = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the MLP (standard deviation 0.02) and compute the frequencies."""
        half = len(self.frequencies)
        steps = torch.arange(half, device=self.frequencies.device)
        self.frequencies.copy_(self.scale * torch.exp(-math.log(10000) * steps / (half - self.frequency_shift)))
        for linear in (self.hidden, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, value: Tensor) -> Tensor:
        """(b,) to (b, width)."""
        with without_autocast(value):
            angle = value.float()[:, None] * self.frequencies
            features = torch.cat([angle.cos(), angle.sin()], dim=-1)
            return self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def step_level(d: Tensor, finest_steps: int) -> Tensor:
    """The step size on the scale the released code embeds: log2(1/d), 0 for d = 1 and log2(M) for d at or below 1/M."""
    return -torch.log2(d.float().clamp(min=1 / finest_steps))


def sincos_positions(width: int, *sizes: int) -> Tensor:
    """Fixed sine-cosine position embedding of a 1-D or 2-D grid, (tokens, width), row-major.

    In two dimensions the first half of the channels encodes the column, the second the row; within each part the sines
    come first, frequencies 10000^(-i/n).

    Raises:
        ValueError: if width does not divide into sines and cosines of each axis.
    """
    if width % (2 * len(sizes)):
        raise ValueError(f"width must be a multiple of {2 * len(sizes)} for {len(sizes)}-D positions, got {width}")
    part = width // len(sizes)
    omega = 10000.0 ** (-torch.arange(part // 2, dtype=torch.float64) / (part // 2))
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
    parts = []
    for axis in reversed(grid):
        angle = axis.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


class Condition(nn.Module):
    """The sum of the embeddings of time t, step size d and condition y.

    Everything in here is float32 under autocast. y is a label with ``num_classes``, where label ``num_classes`` is the
    null condition; or a tensor with ``condition_shape``, where zeros are the null condition; or None with neither. With
    ``guidance_input`` it may also be ``{"y": one of these, "guidance": (b,) float}``, the guidance scale; without one
    the scale is 1, no guidance.

    Args:
        width: size of the embedding.
        num_classes: number of labels.
        condition_shape: shape of one sample's condition tensor.
        finest_steps: M; step sizes at or below 1/M are one and the same.
        time_scale: factor on t, see :class:`SinusoidalEmbedding`.
        ignore_step_size: embed d = 1 whatever d is, as the released code does for its baselines.
        embeds_time: False for a network that embeds t elsewhere.
        time_features, time_frequency_shift: of the embedding of t, see :class:`SinusoidalEmbedding`.
        guidance_input: embed the guidance scale too.

    Raises:
        ValueError: if both kinds of condition are given, or at a call if y does not fit or t or d leave [0, 1].
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int | None = None,
        condition_shape: Sequence[int] | None = None,
        finest_steps: int = 128,
        time_scale: float = 1000.0,
        ignore_step_size: bool = False,
        embeds_time: bool = True,
        time_features: int = 256,
        time_frequency_shift: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        if num_classes is not None and condition_shape is not None:
            raise ValueError(f"give num_classes ({num_classes}) or condition_shape ({condition_shape}), not both")
        require_positive(num_classes=num_classes, finest_steps=finest_steps)
        self.num_classes = num_classes
        self.condition_shape = None if condition_shape is None else tuple(condition_shape)
        self.finest_steps, self.ignore_step_size = finest_steps, ignore_step_size
        self.time: SinusoidalEmbedding | None = None
        if embeds_time:
            self.time = SinusoidalEmbedding(width, time_scale, time_features, time_frequency_shift)
        self.step = SinusoidalEmbedding(width)
        self.guidance = SinusoidalEmbedding(width) if guidance_input else None
        self.label = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.given: nn.Sequential | None = None
        if self.condition_shape is not None:
            layers = nn.Linear(math.prod(self.condition_shape), width), nn.SiLU(), nn.Linear(width, width)
            self.given = nn.Sequential(*layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Labels from a normal distribution of standard deviation 0.02, as the MLPs of t and d."""
        if self.time is not None:
            self.time.reset_parameters()
        self.step.reset_parameters()
        if self.guidance is not None:
            self.guidance.reset_parameters()
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        if self.given is not None:
            for layer in self.given:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    @torch.no_grad()
    def zero_step_embedding(self, finest_steps: int) -> None:
        """Embed every step size as d = 1/finest_steps, so that a network trained as a flow stays that flow for every d.

        The last layer's weights become zero and its bias what it returned; their gradient is not zero, so they learn.

        Args:
            finest_steps: M of the flow's training; 1 for a network that was always given d = 1 (``ignore_step_size``).

        Raises:
            ValueError: for M that is no power of two, or if ``ignore_step_size`` is set.
        """
        if not isinstance(finest_steps, int) or finest_steps < 1 or finest_steps & (finest_steps - 1):
            raise ValueError(f"finest_steps must be a power of two, got {finest_steps!r}")
        if self.ignore_step_size:
            raise ValueError(
                "the network was built with ignore_step_size=True and would never learn it: build it without"
            )
        level = torch.full((1,), math.log2(finest_steps), device=self.step.out.weight.device)
        embedding = self.step(level)[0]
        nn.init.zeros_(self.step.out.weight)
        self.step.out.bias.copy_(embedding)

    def forward(self, t: Tensor, d: Tensor, y: Any, time: Tensor | None = None) -> Tensor:
        """t, d (b,) and y (b,) int64 or (b, *condition_shape) or None, to (b, width).

        ``time`` (b,) is embedded in place of t, for a network that counts time otherwise.
        """
        scale: Tensor | None = None
        if isinstance(y, Mapping) and self.guidance is not None:
            y, scale = y["y"], y["guidance"]
        self._check(t, d, y)
        level = torch.zeros_like(t) if self.ignore_step_size else step_level(d, self.finest_steps)
        c = self.step(level)
        if self.time is not None:
            c = self.time(t if time is None else time) + c
        if self.guidance is not None:
            c = c + self.guidance(torch.ones_like(t) if scale is None else scale)
        if self.label is not None:
            labels = torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.int64) if y is None else y
            c = c + self.label(labels)
        if self.given is not None:
            given = torch.zeros(len(t), math.prod(self.condition_shape or ()), device=t.device) if y is None else y
            with without_autocast(t):
                c = c + self.given(given.flatten(1).to(c.dtype))
        return c

    def _check(self, t: Tensor, d: Tensor, y: Tensor | None) -> None:
        b = len(t)
        if isinstance(y, Mapping):
            raise ValueError(
                f"y must be one tensor, got a mapping of {sorted(y)}: build the network with guidance_input"
            )
        if y is not None:
            self._check_condition(y, b)
        # Reading values is free on a CPU; an accelerator would have to be waited for, a traced tensor has none.
        if t.device.type != "cpu" or type(t) is not Tensor or torch.compiler.is_compiling() or b == 0:
            return
        labels = y if self.label is not None else None
        for name, value, highest in (("t", t, 1), ("d", d, 1), ("y", labels, self.num_classes or 0)):
            if value is not None and not (value.min() >= 0 and value.max() <= highest):
                raise ValueError(
                    f"{name} must lie in [0, {highest}], got {value.min().item():g} to {value.max().item():g}"
                )

    def _check_condition(self, y: Tensor, b: int) -> None:
        if self.label is not None:
            if y.shape != (b,) or y.is_floating_point():
                raise ValueError(f"y must be whole numbers of shape ({b},), got {y.dtype} {tuple(y.shape)}")
        elif self.condition_shape is not None:
            if y.shape != (b, *self.condition_shape) or not y.is_floating_point():
                expected = ", ".join(map(str, (b, *self.condition_shape)))
                raise ValueError(f"y must be floats of shape ({expected}), got {y.dtype} {tuple(y.shape)}")
        else:
            raise ValueError(
                "this network was built without a condition (num_classes=None, condition_shape=None): y must be None"
            )
