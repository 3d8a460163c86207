"""Networks by name, through the entry-point group ``shortcutflow.backbones``.

Nothing here knows a particular backbone: a config names one, and only what is installed can be built.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from shortcutflow import plugins
from shortcutflow.seeds import seed_for

BACKBONE_GROUP = "shortcutflow.backbones"
"""Of entry points; each names a mapping from backbone names to builders."""


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
        ValueError: for an unknown name, listing the installed ones, one that two packages have, or options that its
            builder does not take.
        ImportError: if a package that declares backbones cannot be imported.
    """
    installed = dict(plugins.load_all(BACKBONE_GROUP, "backbone package"))
    found = {origin: builders[config.name] for origin, builders in installed.items() if config.name in builders}
    plugins.only_one("backbone", config.name, found)
    if not found:
        known = [name for builders in installed.values() for name in builders]
        raise ValueError(plugins.unknown("backbone", config.name, known))
    (builder,) = found.values()
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
