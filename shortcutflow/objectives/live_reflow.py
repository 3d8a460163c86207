"""Live reflow (a baseline of the shortcut paper): one network learns the flow and its own reflow at once.

Flow rows teach the network a flow, at d = 1/M. From it the network itself makes pairs of noise and sample, and on their
lines it learns the straightened flow, at d = 1. There d is a name for one of two flows, not the length of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from shortcutflow.objectives.objective import (
    FinestSteps,
    GuidanceScale,
    TrainingObjective,
    guided_evaluations,
    noise_for,
    require_shared_evenly,
)
from shortcutflow.objectives.pairs import end_of_flow
from shortcutflow.objectives.regression import as_batch, rows_of
from shortcutflow.path import interpolate, velocity
from shortcutflow.schedule import draw_times_on_grid
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import WHOLE, Network, SamplerKind, Share, Targets


@dataclass(frozen=True)
class LiveReflowDraw:
    """The random numbers of one evaluation, a row each: reflow rows first, then flow rows.

    Attributes:
        noise: x_0, (r, *shape).
        t: (r,) float32.
        dropped: (r,) bool, rows that lose their condition.
        n_reflow: how many rows are reflow rows.
        source: (r,) int64, the sample each row uses; None means row i uses sample i.
    """

    noise: Tensor
    t: Tensor
    dropped: Tensor
    n_reflow: int
    source: Tensor | None = None


class LiveReflowObjective(TrainingObjective):
    """Flow matching, and reflow from the network's own flow.

    >>> objective = LiveReflowObjective(finest_steps=128, reflow_fraction=0.25)
    >>> report = objective(net, data, labels, target_net=ema_net, generator=g)

    Every sample makes exactly one row: the first ``floor(reflow_fraction * b)`` give a reflow row its condition, the
    others make flow rows. :meth:`released` rebuilds the released code's rows.

    Args:
        finest_steps: M, a power of two: flow rows have d = 1/M.
        reflow_fraction: share of the batch that are reflow rows.
        generation_steps: Euler steps that make a pair.
        guidance_scale: classifier-free guidance of these steps; 1 is none.
        condition_dropout: share of rows, of both kinds, trained on the null condition.
        sigma_min: share of the noise left at t = 1.
        rows: "each_once" as above; "released" as the released code builds them.
    """

    kind: Literal["live_reflow"] = "live_reflow"
    finest_steps: FinestSteps = 128
    reflow_fraction: float = Field(default=0.25, ge=0, le=1, description="share of reflow rows")
    generation_steps: int = Field(default=8, ge=1, description="Euler steps that make a pair")
    guidance_scale: GuidanceScale = 1.0
    rows: Literal["each_once", "released"] = "each_once"

    @classmethod
    def released(
        cls,
        *,
        denoise_timesteps: int = 128,
        bootstrap_every: int = 8,
        cfg_scale: float = 4.0,
        class_dropout_prob: float = 0.1,
    ) -> LiveReflowObjective:
        """The released code's ``train_type=livereflow``.

        b // bootstrap_every reflow rows with the labels of the first images and the noise of the first flow rows, which
        use these images too, while the last images go unused; labels dropped on flow rows only; a cfg_scale of 0 makes
        pairs with the null label but trains them with their own; 1e-5 of the noise left at t = 1. The pairs come from
        the current weights: pass no ``target_net``.
        """
        return cls(
            finest_steps=denoise_timesteps,
            reflow_fraction=1 / bootstrap_every,
            guidance_scale=cfg_scale,
            condition_dropout=class_dropout_prob,
            sigma_min=1e-5,
            rows="released",
        )

    @property
    def tells_step_size(self) -> bool:
        """True: d = 1 asks for the straightened flow, whatever the step."""
        return True

    @property
    def sampler(self) -> SamplerKind:
        """The straightened flow below M steps, the other from M steps on."""
        return "live_reflow"

    def target_evaluations(self, batch_size: int) -> float:
        """The steps that make a pair, on each reflow row."""
        steps = self.generation_steps * guided_evaluations(self.guidance_scale)
        return steps * self.n_reflow(batch_size) / batch_size

    def n_reflow(self, batch_size: int) -> int:
        """How many of batch_size rows are reflow rows.

        Raises:
            ValueError: if reflow_fraction asks for some and the batch is too small to hold one.
        """
        return rows_of(self.reflow_fraction, batch_size, "reflow")

    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> LiveReflowDraw:
        """Noise, times and dropped conditions for a batch of data (b, *shape); ``progress`` is not used.

        Raises:
            ValueError: if a share would have no reflow row while another has, or rows that use another's samples.
        """
        b, device, d = len(data) * share.total, data.device, 1 / self.finest_steps
        n = self.n_reflow(b)
        require_shared_evenly(n, share, "reflow", exactly=self.rows != "each_once")
        generator = generator_or_default(generator, device)
        noise = noise_for(data, generator, share)
        t = draw_times_on_grid(b, d, generator=generator, device=device)[share.rows]
        dropped = self.draw_dropped(b, generator, device)[share.rows]
        if self.rows == "each_once":
            return LiveReflowDraw(noise, t, dropped, share.rows_among_first(n))
        t_reflow = draw_times_on_grid(n, d, generator=generator, device=device)[share.rows]
        return self.released_rows(t_reflow, t, noise, dropped)

    def released_rows(self, t_reflow: Tensor, t_flow: Tensor, noise: Tensor, dropped: Tensor) -> LiveReflowDraw:
        """Merge the released code's draws for n reflow and b flow rows into its b rows."""
        n, b = len(t_reflow), len(t_flow)
        image = torch.arange(b, device=t_flow.device)
        source = torch.cat([image[:n], image[: b - n]])
        return LiveReflowDraw(
            noise=noise[source],
            t=torch.cat([t_reflow, t_flow[: b - n]]),
            dropped=torch.cat([torch.zeros_like(dropped[:n]), dropped[: b - n]]),
            n_reflow=n,
            source=source,
        )

    @torch.no_grad()
    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: LiveReflowDraw,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """The rows of the regression; ``net`` makes the pairs of the reflow rows, ``teacher`` is not used."""
        data, y = as_batch(net, data, y)
        if draw.source is not None:
            data = data[draw.source]
            y = y[draw.source] if y is not None else None
        y = self.drop(y, draw.dropped, null_y)
        n, flow_d = draw.n_reflow, 1 / self.finest_steps
        d = torch.full_like(draw.t, flow_d)
        d[:n] = 1
        if n == 0:
            end = data
        else:
            made = end_of_flow(
                net, draw.noise[:n], y[:n] if y is not None else None,
                steps=self.generation_steps, told=flow_d, scale=self.guidance_scale, null_y=null_y,
            )  # fmt: skip
            end = torch.cat([made, data[n:]])
        return Targets(
            x_t=interpolate(draw.noise, end, draw.t, self.sigma_min),
            t=draw.t,
            d=d,
            y=y,
            # A pair keeps none of its noise, in the released code neither.
            v=torch.cat([velocity(draw.noise[:n], end[:n]), velocity(draw.noise[n:], end[n:], self.sigma_min)]),
            n_bootstrap=n,
            source=draw.source,
        )
