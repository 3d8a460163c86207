"""The mean of x_1 - x_0 at x_t over the samples of a batch (the plug-in velocity of ESC, arXiv 2512.11831).

Many pairs of noise and data lead through one x_t, and what a flow learns is the mean of their velocities. A row knows
that of its own pair alone; but any other sample x_1' of the batch would have come to x_t too, with another noise x_0':

    v(x_t, t)  ~  sum_j p_j (x_1' - x_0'),     x_0' = (x_t - t x_1') / (1 - t),     p_j ~ exp(-|x_0'|^2 / 2)

Given the samples of a batch this is the mean of the row's own target, the noise being normal and independent of them:
its mean over batches is the same, and its variance smaller (Rao and Blackwell).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from shortcutflow.conditions import Condition, is_labels
from shortcutflow.objectives.objective import Context, Draw, Objective, as_batch, noise_like
from shortcutflow.types import Network


class FlowObjective(Objective):
    """Base of objectives whose rows follow x_1 - x_0, or its mean over the samples of a batch.

    Args:
        plug_in_groups: G: x_1 - x_0 is replaced by its mean at x_t over the samples with the row's label, in the same
            of G groups of the global batch: row i is in group i modulo G. A row whose condition is dropped has the mean
            over all of its group, as one of data without labels. None is no mean. Slices of a batch (processes times
            accumulation) must divide G, so that their numbers are those of the whole.
        others: see :class:`Objective`.
    """

    plug_in_groups: int | None = Field(default=None, ge=1, description="groups of rows with a common mean velocity")

    def draw_noise(self, data: Tensor, generator: Generator, context: Context) -> Tensor:
        """x_0 for data, a slice of a batch.

        Raises:
            ValueError: if a mean velocity needs other noise than the context has, or rows of other slices.
        """
        self._groups_here(context)
        return noise_like(data, generator, context)

    def path_rows(
        self, net: Network, data: Tensor, y: Condition, draw: Draw, context: Context
    ) -> tuple[Tensor, Tensor, Condition]:
        """x_t, v and the condition of each row of a draw.

        Raises:
            ValueError: as of :meth:`draw_noise`; if plug_in_groups is set and y is no labels.
        """
        x_t, v, of_rows = super().path_rows(net, data, y, draw, context)
        groups = self._groups_here(context)
        if groups is None:
            return x_t, v, of_rows
        data, y = as_batch(net, data, self.labels(y))
        sample = torch.arange(len(data), device=data.device)
        own = sample if draw.source is None else draw.source
        alike = own[:, None] % groups == sample % groups
        if y is not None:
            if not is_labels(y):
                raise ValueError("plug_in_groups needs labels, whole numbers (b,), or no y: other conditions differ")
            alike &= (y[own, None] == y) | draw.dropped[:, None]
        return x_t, v + mean_change(draw.noise, data, draw.t, own, alike, self.sigma_min).to(v.dtype), of_rows

    def labels(self, y: Condition) -> Condition:
        """The part of a condition that says which samples are of one kind."""
        return y

    def _groups_here(self, context: Context) -> int | None:
        """How many groups this slice of a batch holds: row k of it is in group k modulo so many."""
        groups, count = self.plug_in_groups, context.batch_slice.count
        if groups is None:
            return None
        if context.noise is not None:
            raise ValueError(
                "plug_in_groups takes the noise for independent of the samples, and noise= was chosen for them: pass "
                "none, and in a run use coupling=null, or leave out plug_in_groups"
            )
        if groups % count:
            raise ValueError(
                f"plug_in_groups is {groups}, and of {count} slices (processes times accumulation) each must hold "
                f"whole groups: use a multiple of {count}"
            )
        return groups // count


def mean_change(noise: Tensor, data: Tensor, t: Tensor, own: Tensor, alike: Tensor, sigma_min: float = 0.0) -> Tensor:
    """The mean velocity at x_t less that of each row's own pair, (r, *shape).

    With a = 1 - (1 - sigma_min) t, another sample x_1' comes to x_t from x_0' = x_0 + (t/a)(x_1 - x_1'), and its
    velocity is greater by (x_1' - x_1)/a.

    Args:
        noise: x_0, (r, *shape).
        data: all samples, (b, *shape).
        t: (r,).
        own: (r,) int64, the sample of each row.
        alike: (r, b) bool, the samples that each row's mean is over, its own among them.
        sigma_min: share of the noise that is left at t = 1.
    """
    dtype = torch.promote_types(data.dtype, torch.float32)
    x_0, samples = noise.to(dtype).flatten(1), data.to(dtype).flatten(1)
    x_1, t = samples[own], t.to(dtype)[:, None]
    a = (1 - (1 - sigma_min) * t).clamp(min=1e-6)
    ratio = t / a
    # |x_0'|^2, but for what a row's samples have in common, of distances alone: products would be rounded, by autocast
    # or as TF32, to more than the difference of two samples at a late time.
    exact = "donot_use_mm_for_euclid_dist"
    to_start, between = (torch.cdist(x, samples, compute_mode=exact).square() for x in (x_0 + x_1, x_1))
    square = ratio * (to_start + (ratio - 1) * between)
    p = torch.softmax(torch.where(alike, -square / 2, -torch.inf), dim=1)
    with torch.autocast(data.device.type, enabled=False):
        change = (p - one_hot(own, len(samples))) @ samples
    return (change / a).view_as(noise)
