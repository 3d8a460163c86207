"""Networks by name, through the entry-point group ``shortcutflow.backbones``.

Nothing here knows a particular backbone: a config names one, and only what is installed can be built.
"""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from shortcutflow.seeds import seed_for

ENTRY_POINT_GROUP = "shortcutflow.backbones"


class BackboneConfig(BaseModel):
    """A registered name and the options of its builder; shape, num_classes and finest_steps come from the run.

    Args:
        name: of the backbone.
        options: of its builder.
        smoke_options: what a smoke run adds to the options, or puts in their place, so that a large network is tiny.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    smoke_options: dict[str, Any] = Field(default_factory=dict)

    def smoke(self) -> BackboneConfig:
        """The same network, tiny."""
        return self.model_copy(update={"options": self.options | self.smoke_options})


def build_network(
    config: BackboneConfig,
    *,
    shape: tuple[int, ...],
    num_classes: int | None,
    condition_shape: tuple[int, ...] | None = None,
    finest_steps: int,
    seed: int,
) -> nn.Module:
    """Build the named network, its initial weights a function of the seed.

    Raises:
        ValueError: for an unknown name, listing the installed ones, or options its builder does not take.
    """
    known: list[str] = []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        builders = entry.load()
        known += builders
        if config.name not in builders:
            continue
        builder = builders[config.name]
        options = {"shape": shape, "num_classes": num_classes, "finest_steps": finest_steps}
        # Only what is conditioned on tensors has to know of them.
        options |= {"condition_shape": condition_shape} if condition_shape is not None else {}
        options |= config.options
        try:
            inspect.signature(builder).bind(**options)
        except TypeError as error:
            raise ValueError(f"backbone {config.name!r}: {error}; it takes {inspect.signature(builder)}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "network"))
            return builder(**options)
    hint = "" if known else "; none is installed, so the package itself is not: pip install -e ."
    raise ValueError(f"unknown backbone {config.name!r}; known: {', '.join(sorted(known))}{hint}")
