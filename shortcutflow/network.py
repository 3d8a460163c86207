"""Networks by name, through the entry-point group ``shortcutflow.backbones``.

Nothing here knows a particular backbone: a config names one, and only what is installed can be built.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from shortcutflow import plugins
from shortcutflow.path import expand_to
from shortcutflow.seeds import seed_for

BACKBONE_GROUP = "shortcutflow.backbones"
"""Of entry points; each names a mapping from backbone names to builders."""
LEAST_TIME_LEFT = 1 / 1024
"""The least 1 - t that a prediction of data is divided by, a bound on the velocity at t near 1, where a small error of
the data is a large one of it; below 1/M of any M up to 1024, whose last step so ends exactly at the prediction."""


class BackboneConfig(BaseModel):
    """A registered name and the options of its builder; shape, num_classes and finest_steps come from the run.

    Args:
        name: of the backbone.
        options: of its builder.
        smoke_options: what a smoke run adds to the options, or puts in their place, so that a large network is tiny.
        prediction: what the network itself puts out: the velocity, or data; see :func:`predict_data`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    smoke_options: dict[str, Any] = Field(default_factory=dict)
    prediction: Literal["velocity", "data"] = "velocity"

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
        network: nn.Module = builder(**options)
    return predict_data(network) if config.prediction == "data" else network


def predict_data(network: nn.Module) -> nn.Module:
    """Let a network whose output is data, x^(x_t, t, d, y), return the velocity that leads there, (x^ - x_t)/(1 - t).

    So x^ is where the step over all the time that is left would end: an estimate of x_1 (Dreamer 4, arXiv 2509.24527).
    Whatever calls the network is given a velocity, in float32 at least; 1 - t counts as 1/1024 where it is less.

    The network stays the module it was, so that it compiles, shards, copies and loads as before. A copy that is loaded
    from its weights needs the same call.
    """
    network.register_forward_hook(_as_velocity)
    return network


def _as_velocity(network: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    x_t, t = inputs[:2]
    x_1, *aux = output if isinstance(output, tuple) else (output,)
    difference: Tensor = x_1.to(torch.promote_types(x_1.dtype, torch.float32)) - x_t
    v = difference / expand_to((1 - t).clamp(min=LEAST_TIME_LEFT), difference)
    return (v, *aux) if aux else v
