"""Couplings: which noise x_0 belongs to which data x_1.

Drawn independently, as the paper does, the lines from noise to data cross, so that the flow bends: what one step can do
is limited by it. Optimal transport within a pool of samples gives each sample a noise near it (Pooladian et al. 2023,
"Multisample Flow Matching"; Tong et al. 2023, "Improving and Generalizing Flow-Based Generative Models"): the lines
cross less. Noise is only permuted, so noise and data as such stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shortcutflow.conditions import Condition, is_labels

EXACT_ROWS = 4096
"""Rows that are assigned exactly; the time of it grows with their third power, to seconds here."""


class TransportCoupling(BaseModel):
    """Optimal transport between the noise and the data of a pool of samples: the squared distances' sum is smallest.

    Args:
        pool: samples that are assigned together, taken from as many batches as it needs: in training about 64 rows of
            each, see :class:`shortcutflow.data.coupled.CoupledStream`. More make shorter lines, and take more time.
        per_class: of labelled data, permute noise among the samples of each class only. Otherwise the noise of a class
            is not standard normal any more, while samplers draw such noise for every class. Conditions that are not
            labels cannot be kept apart so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["transport"] = "transport"
    pool: int = Field(default=1792, ge=2, description="samples that are assigned together")
    per_class: bool = Field(default=True, description="permute noise among the samples of a class only")

    def couple(self, noise: Tensor, data: Tensor, y: Condition = None) -> Tensor:
        """The noise of a pool, permuted; see :func:`couple`."""
        return couple(noise, data, y if self.per_class else None)


def couple(noise: Tensor, data: Tensor, y: Condition = None) -> Tensor:
    """The noise in the order in which row i is for sample i: the sum of all |x_1 - x_0|^2 is the smallest.

    A class of more than ``EXACT_ROWS`` rows is cut into equal parts that are assigned exactly, each for itself: that is
    a permutation as it stands, whereas a Sinkhorn plan must be rounded to one.

    Args:
        noise, data: x_0 and x_1, (n, *shape) each, on any device; the assignment itself runs on the CPU.
        y: labels (n,), within which noise is permuted; of any other condition, or None, among all rows.

    Returns:
        (n, *shape): the rows of ``noise``, each once.

    Raises:
        ValueError: if noise and data have different shapes.
        ImportError: without scipy.
    """
    if noise.shape != data.shape:
        raise ValueError(f"noise must have the shape of data, {tuple(data.shape)}, got {tuple(noise.shape)}")
    order = torch.arange(len(data))
    for rows in _assigned_together(len(data), y):
        order[rows] = rows[_assign(noise[rows], data[rows])]
    return noise[order]


def _assigned_together(n: int, y: Condition) -> Iterator[Tensor]:
    """The rows of each class, or of its parts."""
    labels = y.cpu() if is_labels(y) else torch.zeros(n, dtype=torch.int64)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        yield from rows.tensor_split(math.ceil(len(rows) / EXACT_ROWS))


def _assign(noise: Tensor, data: Tensor) -> Tensor:
    """For each sample (n,) the number of its noise."""
    # Over all permutations the sum of squared distances is a constant minus twice that of the products.
    products = data.flatten(1).double() @ noise.flatten(1).double().T
    # In double precision and then rounded: the order of the sums, which differs with the number of threads, must not
    # decide between the two rows of a sample that a pool holds twice.
    products = products.float().nan_to_num()  # the step names samples that are not finite
    _, column = linear_sum_assignment()(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(column)


def linear_sum_assignment() -> Callable[..., Any]:
    """scipy's function of this name.

    Raises:
        ImportError: saying what to install.
    """
    try:
        from scipy.optimize import linear_sum_assignment as solve
    except ImportError as error:
        raise ImportError("couplings need scipy: pip install 'shortcutflow[train]'") from error
    return solve
