"""Guidance as an input of a shortcut model (iSM, "Improved Training Technique for Shortcut Models", arXiv 2510.21250).

The network is given the guidance scale w beside t and d, as one more part of its condition. Flow rows with w > 1 learn
what guidance makes of the velocity, and a step of any size is two half steps of the same w:

    s(x_t, t, 1/M, y, w)  <-  x_1 - x_0 + (w - 1) ( s(x_t, t, 1/M, y, 1) - s(x_t, t, 1/M, null, 1) )
    s(x_t, t, d, y, w)    <-  ( s(x_t, t, d/2, y, w) + s(x', t + d/2, d/2, y, w) ) / 2

So w is chosen when sampling, for one call a step, and is the same at every step size: guiding the two half steps of
every size in turn would make w^7 of it from d = 1/128 to 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from shortcutflow.conditions import Condition, concatenate, null_like, require_null, select
from shortcutflow.guidance import predict, with_scale
from shortcutflow.objectives.objective import NO_CONTEXT, Context, Draw, count_of, require_sliced_evenly
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.path import expand_to
from shortcutflow.seeds import generator_or_default
from shortcutflow.types import Network, Targets


class GuidedShortcutObjective(ShortcutObjective):
    """A shortcut model that takes the guidance scale w as an input.

    >>> net = backbones.create("dit_b_2", shape=(4, 32, 32), num_classes=1000, guidance_input=True)
    >>> objective = GuidedShortcutObjective(condition_dropout=0.1)
    >>> report = objective(net, data, labels, target_net=ema_net, null_y=1000)
    >>> images = shortcutflow.sample(net, noise, labels, steps=1, guidance_scale=2.5)  # one call of the network

    The network is called with ``y={"y": y, "guidance": w}``, w (b,) float32.

    Args:
        max_guidance: w is uniform between 1 and this.
        guided_fraction: share of the flow rows, and on average of the bootstrap rows, with w > 1; the others have 1.
        guided_from: guidance changes nothing before this time (iSM: 0.3), whatever w is.
        others: see :class:`ShortcutObjective`; its ``guidance_scale`` and ``flow_of`` have no meaning here.
    """

    kind: Literal["guided_shortcut"] = "guided_shortcut"  # type: ignore[assignment]
    max_guidance: float = Field(default=4.0, gt=1, allow_inf_nan=False, description="largest guidance scale")
    guided_fraction: float = Field(default=0.25, gt=0, le=1, description="share of rows with a scale above 1")
    guided_from: float = Field(default=0.0, ge=0, lt=1, description="time before which nothing is guided")

    @model_validator(mode="after")
    def _has_one_guidance(self) -> GuidedShortcutObjective:
        for name in ("guidance_scale", "guidance_from", "flow_of", "rows"):
            if getattr(self, name) != ShortcutObjective.model_fields[name].default:
                raise ValueError(f"{name} is for kind 'shortcut': here the guidance scale is an input of the network")
        return self

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as it is; raises ValueError for one that does not take the guidance scale."""
        if not getattr(network, "guidance_input", False):
            raise ValueError(
                "objective 'guided_shortcut' needs a network that takes the guidance scale as an input: build the "
                "backbone with guidance_input=True (backbone.options), or give yours an attribute guidance_input = True"
            )
        return network

    def labels(self, y: Condition) -> Condition:
        """Without the guidance scale."""
        return y["y"]

    def n_guided(self, batch_size: int) -> int:
        """How many flow rows of such a batch have a scale above 1.

        Raises:
            ValueError: if the batch is too small to hold one.
        """
        return count_of(self.guided_fraction, batch_size - self.n_bootstrap(batch_size), "guided")

    def target_evaluations(self, batch_size: int) -> float:
        """As of a shortcut model, and two evaluations on each guided flow row."""
        return super().target_evaluations(batch_size) + 2 * self.n_guided(batch_size) / batch_size

    def draw(self, data: Tensor, generator: Generator | None = None, context: Context = NO_CONTEXT) -> Draw:
        """As of a shortcut model, then w of each row; the first flow rows are those with w > 1."""
        generator = generator_or_default(generator, data.device)
        draw, here = super().draw(data, generator, context), context.batch_slice
        b = context.batch_size(data)
        n = self.n_bootstrap(b, context.progress)
        last = n + self.n_guided(b)
        require_sliced_evenly(last - n, here, "guided", exactly=False)
        u, chosen = torch.rand(2, b, generator=generator, device=data.device)
        is_guided = chosen < self.guided_fraction
        is_guided[n:last].fill_(True)
        is_guided[last:].fill_(False)
        scale = torch.where(is_guided, 1 + (self.max_guidance - 1) * u, torch.ones_like(u))
        return replace(draw, scale=scale[here.rows], max_guided=here.count_below(last))

    @torch.no_grad()
    def targets(self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context = NO_CONTEXT) -> Targets:
        """The rows of a shortcut model at their w, with guided flow rows.

        Raises:
            ValueError: without y or null_y, and as for a shortcut model.
        """
        if y is None:
            raise ValueError("guided_shortcut guides by a condition: pass y, or use kind 'shortcut' for data without")
        scale = torch.ones_like(draw.t) if draw.scale is None else draw.scale
        null_y = with_scale(require_null(context.null_y), 1.0)
        rows = super().targets(net, data, with_scale(y, scale), draw, replace(context, null_y=null_y))
        guided = slice(draw.n_bootstrap, max(draw.max_guided, draw.n_bootstrap))
        if guided.start == guided.stop:
            return rows
        x_t, t, d, of_rows = rows.x_t[guided], rows.t[guided], rows.d[guided], select(rows.y, guided)
        unguided = with_scale(of_rows["y"], torch.ones_like(t))
        v_y, v_null = predict(
            context.target_network(net), torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([d, d]),
            concatenate(unguided, null_like(unguided, null_y)),
        ).chunk(2)  # fmt: skip
        extra = (of_rows["guidance"] - 1) * (t >= self.guided_from)
        followed = rows.v[guided] + expand_to(extra, v_y) * (v_y - v_null)
        v = torch.cat([rows.v[: guided.start], followed.to(rows.v.dtype), rows.v[guided.stop :]])
        return replace(rows, v=v)
