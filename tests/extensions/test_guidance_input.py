"""(c) A network that takes the guidance scale w as an input, and an objective that trains it (iSM, arXiv 2510.21250).

Rows with w > 0 learn v + w (s(x_t, y, 0) - s(x_t, null, 0)): what guidance of scale 1 + w makes of the velocity, in one
call of the network when sampling. w is one more part of the condition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Generator, Tensor, nn

import shortcutflow as sf
from shortcutflow.guidance import predict
from shortcutflow.objectives import Context, Draw
from shortcutflow.objectives.objective import NO_CONTEXT
from shortcutflow.path import expand_to
from shortcutflow.seeds import generator_or_default

NULL = 2

# ---- the package


@dataclass(frozen=True)
class DrawWithScale(Draw):
    """A draw, and w of each row, (b,)."""

    w: Tensor | None = None


class GuidedFlow(sf.FlowMatchingObjective):
    """Flow matching, with guidance of a random scale in half of the rows."""

    kind: Literal["guided_flow"] = "guided_flow"  # type: ignore[assignment]
    max_w: float = 3.0

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        generator = generator_or_default(generator, data.device)
        draw = super().draw(data, generator, context)
        b = context.batch_size(data)
        w = self.max_w * torch.rand(b, generator=generator, device=data.device) * (torch.arange(b) % 2)
        return DrawWithScale(**vars(draw), w=w[context.batch_slice.rows])

    def targets(self, net: Any, data: Tensor, y: Any, draw: Any, context: Context = NO_CONTEXT) -> sf.Targets:
        # Rows that are guided keep their condition.
        draw = replace(draw, dropped=draw.dropped & (draw.w == 0))
        rows = super().targets(net, data, y, draw, context)
        none = torch.zeros_like(draw.w)

        def of(label: Tensor) -> Tensor:
            return predict(context.target_network(net), rows.x_t, rows.t, rows.d, {"label": label, "w": none})

        difference = of(rows.y) - of(torch.full_like(rows.y, context.null_y))
        return replace(rows, v=rows.v + expand_to(draw.w, rows.v) * difference, y={"label": rows.y, "w": draw.w})


class Net(nn.Module):
    """A small network; a bare label is w = 0."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.label = nn.Embedding(NULL + 1, width)
        self.given = nn.Linear(4, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        label, w = (y["label"], y["w"]) if isinstance(y, dict) else (y, torch.zeros_like(t))
        return self.body(self.given(torch.cat([x_t, t[:, None], w[:, None]], dim=1)) + self.label(label))


# ---- what is checked


@pytest.mark.slow
def test_one_call_with_w_is_two_calls_with_guidance() -> None:
    torch.manual_seed(0)
    net, generator = Net(), Generator().manual_seed(0)
    objective = GuidedFlow(condition_dropout=0.2)
    optimizer, ema = torch.optim.Adam(net.parameters(), lr=2e-3), sf.EMA(net, sf.EMAConfig(decay=0.99))
    centres = torch.tensor([[-1.0, 0.5], [1.0, 0.5]])
    for step in range(800):
        y = torch.randint(2, (256,), generator=generator)
        data = centres[y] + 0.7 * torch.randn(256, 2, generator=generator)
        objective(net, data, y, target_net=ema.network, null_y=NULL, generator=generator).loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 800)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(net, step)
    noise, label = torch.randn(1000, 2, generator=generator), torch.arange(1000) % 2

    def samples(w: float, guidance_scale: float) -> Tensor:
        return sf.sample(
            ema.network, noise, {"label": label, "w": torch.full((1000,), w)}, steps=32, flow_only=True,
            guidance_scale=guidance_scale, null_y={"label": NULL, "w": 0.0},
        )  # fmt: skip

    plain, by_input, by_two_calls = samples(0, 1), samples(2, 1), samples(0, 3)

    def distance(a: Tensor, b: Tensor) -> float:
        """The median over samples: a few near the border between the classes end far apart."""
        return float((a - b).norm(dim=1).median())

    moved = distance(by_two_calls, plain)
    assert moved > 0.3, "guidance does something here"
    assert distance(by_input, by_two_calls) < 0.3 * moved, "a network that ignores w is at 1"
    assert torch.equal(sf.sample(ema.network, noise, label, steps=32, flow_only=True), plain)
