"""(b) MeanFlow (Geng et al. 2025, arXiv 2505.13447) by a Jacobian-vector product, with its adaptive weight.

From (r - t) s(x_t, t, r - t) = the integral of v over [t, r], differentiated by t along the flow with r fixed:

    s  <-  v + d (v . grad_x + d/dt - d/dd) s,     d = r - t
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Generator, Tensor, nn

import shortcutflow as sf
from shortcutflow.guidance import predict
from shortcutflow.objectives import Context, Draw, Objective
from shortcutflow.objectives.objective import NO_CONTEXT, noise_like, rms_metrics
from shortcutflow.path import expand_to, interpolate, velocity
from shortcutflow.schedule import LogitNormal, draw_times
from shortcutflow.seeds import generator_or_default
from tests.core.gaussian import Gaussian

# ---- the package


class MeanFlow(Objective):
    """t and t + d from one density; a fraction of the rows is flow matching, d = 0.

    Args:
        flow_fraction: of rows with d = 0.
        power, floor: the weight of a row is (err + floor)^-power.
        follow_flow: add the derivative along the flow; without it the target is v (the negative control).
    """

    kind: Literal["own_mean_flow"] = "own_mean_flow"
    flow_fraction: float = 0.5
    power: float = 0.5
    floor: float = 1e-2
    density: LogitNormal = LogitNormal(mean=0.0, std=1.5)
    follow_flow: bool = True

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        b, device, generator = context.batch_size(data), data.device, generator_or_default(generator, data.device)
        noise = noise_like(data, generator, context)
        times = [draw_times(b, density=self.density, generator=generator, device=device) for _ in range(2)]
        t, r = torch.minimum(*times), torch.maximum(*times)
        n = b - int(self.flow_fraction * b)
        d = torch.cat([(r - t)[:n], torch.zeros_like(t[n:])])
        return Draw(noise, t, d, self.draw_dropped(b, generator, device), n).at(context.batch_slice)

    def targets(self, net: Any, data: Tensor, y: Any, draw: Draw, context: Context = NO_CONTEXT) -> sf.Targets:
        data, y = self.row_inputs(net, data, y, draw, context)
        x_t = interpolate(draw.noise, data, draw.t, self.sigma_min)
        v = velocity(draw.noise, data, self.sigma_min)

        def s(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
            return predict(context.target_network(net), x, t, d, y)

        one = torch.ones_like(draw.t)
        _, slope = torch.func.jvp(s, (x_t, draw.t, draw.d), (v, one, -one))
        target = v + expand_to(draw.d, v) * slope if self.follow_flow else v
        return sf.Targets(x_t, draw.t, draw.d, y, target, draw.n_bootstrap, rms_metrics(slope=slope))

    def weigh(self, error: Tensor, targets: sf.Targets, aux: Any) -> Tensor:
        return error / (error.detach() + self.floor) ** self.power


# ---- what is checked

GAUSSIAN = Gaussian.example(3)


def test_the_exact_flow_map_is_its_own_target() -> None:
    """In the mean over the data, where v has the mean of the flow: here v is put in its place."""
    data = GAUSSIAN.draw(64, Generator().manual_seed(0))
    draw = MeanFlow(flow_fraction=0).draw(data, Generator().manual_seed(1))
    exact = GAUSSIAN.net()
    x_t = interpolate(draw.noise, data, draw.t)
    # The noise whose straight line through x_t has the flow's velocity.
    v = GAUSSIAN.velocity(x_t, draw.t)
    noise = x_t - expand_to(draw.t, x_t) * v
    straight = Draw(noise, draw.t, draw.d.double(), draw.dropped, draw.n_bootstrap)
    rows = MeanFlow().targets(exact, noise + v, None, straight)
    assert (rows.v - exact(rows.x_t, rows.t, rows.d, None)).abs().max() < 1e-6
    wrong = MeanFlow(follow_flow=False).targets(exact, noise + v, None, straight)
    assert (wrong.v - exact(wrong.x_t, wrong.t, wrong.d, None)).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("follow_flow", [True, False], ids=["mean flow", "negative control"])
def test_one_step_after_training(follow_flow: bool) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 3))

    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Any) -> Tensor:
        return body(torch.cat([x_t, t[:, None], d[:, None]], dim=1))

    objective, generator = MeanFlow(follow_flow=follow_flow), Generator().manual_seed(0)
    optimizer = torch.optim.Adam(body.parameters(), lr=2e-3)
    for step in range(800):
        objective(net, GAUSSIAN.draw(256, generator).float(), generator=generator).loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 800)
        optimizer.step()
        optimizer.zero_grad()
    noise = torch.randn(2000, 3, generator=generator)
    exact = GAUSSIAN.flow_map(noise.double(), torch.zeros(2000), torch.ones(2000))
    error = float((sf.sample(net, noise, steps=1) - exact).square().mean().sqrt())
    assert error < 0.15 if follow_flow else error > 0.4, error
