"""The networks that every contract test runs over: every family of ``backbones.names()``.

A name belongs to the family before its first underscore (``dit_b_2`` to ``dit``). A family of this package needs a row
in the table, with its tiny sizes. A family of another package needs nothing: each of its names is tested without
options, for images and sequences, unless its builder refuses the shape with ValueError. One such package lies in
``installed/``, as an installer leaves it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import backbones
from backbones.backbone import Backbone

IMAGE, SEQUENCE = (3, 8, 8), (8, 4)
ODD_IMAGES = (3, 7, 5), (1, 9, 6)
CLASSES = 5
CONDITION = (2, 3)


@dataclass(frozen=True)
class Tiny:
    """Options that make a backbone small, the options to vary on top for each shape, and a package it may lack.

    ``odd_sizes``: whether it takes images of any size, rather than refuse those that do not halve.
    """

    options: dict[str, Any]
    images: tuple[dict[str, Any], ...] = ({},)
    sequences: tuple[dict[str, Any], ...] = ({},)
    requires: str | None = None
    odd_sizes: bool = True


TOKENS: dict[str, Any] = {"width": 32, "depth": 2, "patch": 2}
LEVELS: dict[str, Any] = {"width": 16, "multipliers": (1, 2), "stages": 1}
NOISE: dict[str, Any] = {"diffusion": {"predicts": "noise"}}
CONVENTIONS = ({"released": False}, {"released": True}, NOISE | {"time_scale": 1.0})
DIFFUSERS: dict[str, Any] = {
    "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    "layers_per_block": 1, "norm_num_groups": 8,
    # No loss depends on the bias of its keys, so a gradient of rounding errors is all that could be compared.
    "add_attention": False,
}  # fmt: skip
TINY: dict[str, Tiny] = {
    "diffusers": Tiny({"unet": DIFFUSERS}, sequences=(), requires="diffusers", odd_sizes=False),
    "dit": Tiny(TOKENS | {"heads": 2}, CONVENTIONS, CONVENTIONS),
    "lstm": Tiny(TOKENS, ({}, {"cell": "gru"}), ({}, {"cell": "gru"}, {"causal": True})),
    "mamba": Tiny(TOKENS | {"state": 4}, sequences=({}, {"bidirectional": False})),
    "transformer": Tiny(TOKENS | {"heads": 2}, requires="x_transformers"),
    "unet": Tiny(LEVELS | {"attention_levels": (1,), "head_width": 8}),
    "unet1d": Tiny(LEVELS, images=()),
}


@dataclass(frozen=True)
class Case:
    """One network of the table."""

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        usual = TINY[self.family].options if self.family in TINY else {}
        told = [f"{key}={value}" for key, value in self.options.items() if usual.get(key) != value]
        return "-".join([self.name, "x".join(map(str, self.shape)), *told])

    @property
    def family(self) -> str:
        return family_of(self.name)

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    def of(self, shape: tuple[int, ...], **options: Any) -> Case:
        """The same for samples of another shape, or with other options."""
        return dataclasses.replace(self, shape=shape, options=self.options | options)

    def build(self, *, seed: int = 0, num_classes: int | None = CLASSES, **options: Any) -> Any:
        """The network as it is created, from a seed."""
        torch.manual_seed(seed)
        return backbones.create(self.name, shape=self.shape, num_classes=num_classes, **(self.options | options))

    def awake(self, *, seed: int = 0, num_classes: int | None = CLASSES, **options: Any) -> Any:
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

    def accepts(self, **options: Any) -> bool:
        """Whether the builder takes this case's shape with these options."""
        try:
            backbones.create(self.name, shape=self.shape, **(self.options | options))
        except ValueError:
            return False
        return True


def family_of(name: str) -> str:
    return name.partition("_")[0]


@contextmanager
def third_party_installed() -> Iterator[None]:
    """Names of the package in ``installed/`` are known."""
    path = str(Path(__file__).parent / "installed")
    sys.path.insert(0, path)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(path)


def cases() -> Iterator[Case]:
    families: dict[str, list[str]] = {}
    for name in backbones.names():
        families.setdefault(family_of(name), []).append(name)
    for family, names in families.items():
        if family in TINY:
            # Presets differ in sizes only; the first name is the family's own, if there is one of that name.
            tiny = TINY[family]
            for shape, variants in ((IMAGE, tiny.images), (SEQUENCE, tiny.sequences)):
                yield from (Case(names[0], shape, tiny.options | variant) for variant in variants)
        else:
            yield from (c for name in names for c in (Case(name, IMAGE), Case(name, SEQUENCE)) if c.accepts())


def params(chosen: Iterable[Case]) -> pytest.MarkDecorator:
    """The decorator of a test that runs over cases; those that lack an optional package are skipped."""

    def param(case: Case) -> Any:
        required = TINY[case.family].requires if case.family in TINY else None
        missing = required is not None and importlib.util.find_spec(required) is None
        return pytest.param(case, id=str(case), marks=pytest.mark.skipif(missing, reason=f"needs {required}"))

    return pytest.mark.parametrize("case", [param(case) for case in chosen])


with third_party_installed():
    CASES = list(cases())
    OWN = [case for case in CASES if case.family in TINY or isinstance(case.build(), Backbone)]
    _IMAGES = [case.of(shape) for case in CASES if case.is_image for shape in ODD_IMAGES]
    ODD = [case.of(case.shape, patch=1) if "patch" in case.options else case for case in _IMAGES]
    ODD = [case for case in ODD if (TINY[case.family].odd_sizes if case.family in TINY else case.accepts())]
    CONDITIONED = [case for case in CASES if case.family in TINY or case.accepts(condition_shape=CONDITION)]

every_case = params(CASES)
every_sequence = params(case for case in CASES if not case.is_image)
every_odd_size = params(ODD)
every_case_with_tensor_condition = params(CONDITIONED)
every_backbone = params(OWN)
"""The networks derived from Backbone, which promise more."""
FIRST = list({case.family: case for case in reversed(OWN)}.values())
one_of_each_family = params(FIRST)
"""Of these, the first of each family: for what takes seconds. Of images, if it takes them."""
