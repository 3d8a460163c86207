"""The networks that every contract test runs over: one table, to which a new backbone adds its tiny sizes.

A name of the registry belongs to the family before its first underscore (``dit_b_2`` to ``dit``); every family needs a
row here, which gives it all tests of test_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import backbones

IMAGE, SEQUENCE = (3, 8, 8), (8, 4)
CLASSES = 5


@dataclass(frozen=True)
class Tiny:
    """Options that make a backbone small, the options to vary on top, and the shapes it takes."""

    options: dict[str, Any]
    variants: tuple[dict[str, Any], ...] = ({},)
    shapes: tuple[tuple[int, ...], ...] = (IMAGE, SEQUENCE)


TINY: dict[str, Tiny] = {
    "dit": Tiny({"width": 32, "depth": 2, "heads": 2, "patch": 2}, variants=({"released": False}, {"released": True})),
}


@dataclass(frozen=True)
class Case:
    """One network of the table."""

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{key}={value}" for key, value in self.options.items() if key not in TINY[self.name].options]
        return "-".join([self.name, "x".join(map(str, self.shape)), *told])

    def build(self, *, seed: int = 0, num_classes: int | None = CLASSES, **options: Any) -> nn.Module:
        """The network as it is created, from a seed."""
        torch.manual_seed(seed)
        return backbones.create(self.name, shape=self.shape, num_classes=num_classes, **self.options, **options)

    def awake(self, *, seed: int = 0, num_classes: int | None = CLASSES, **options: Any) -> nn.Module:
        """The same, parameters that start at zero or close to it being drawn anew: its output depends on them all."""
        net = self.build(seed=seed, num_classes=num_classes, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad and p.square().mean() < 0.05**2:
                    p.normal_(std=0.2, generator=generator)
        return net.eval()

    def inputs(self, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, t, d, y of a batch."""
        generator = torch.Generator().manual_seed(seed)
        x_t = torch.randn((batch, *self.shape), generator=generator)
        t = torch.rand(batch, generator=generator) / 2
        d = 2.0 ** -torch.randint(1, 6, (batch,), generator=generator)
        return x_t, t, d, torch.randint(CLASSES, (batch,), generator=generator)


def cases() -> Iterator[Case]:
    for name, tiny in TINY.items():
        for shape in tiny.shapes:
            for variant in tiny.variants:
                yield Case(name, shape, tiny.options | variant)
