"""A random model in the place of a trained one, so that a recipe that begins with one can be tried from nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from shortcutflow.config import CONFIG_FILE, CURRENT, RunConfig
from shortcutflow.io.atomic import build_once
from shortcutflow.models.config import config_of_run
from shortcutflow.models.model import Model
from shortcutflow.seeds import generator_for


@torch.no_grad()
def fake_model(config: RunConfig) -> Path:
    """The folder of a flow model with the run's network and random weights, below ``data/``, written if need be."""
    of_run = config_of_run(config, config.data.describe(), weights=CURRENT, step=None)
    about = {"weights": "random numbers, to try a recipe with"}
    described = of_run.model_copy(update={"flow_only": True, "sampler": "euler", "about": about})
    digest = hashlib.sha256(described.model_dump_json().encode()).hexdigest()[:12]
    network, generator = config.build_network(), generator_for(0, "stand-in model")
    for parameter in network.parameters():  # as it starts, it returns zero for any input
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)

    def write(folder: Path) -> None:
        Model(network, described, CURRENT, folder).save(folder)

    return build_once(Path("data") / f"smoke-model-{digest}", write, marker=CONFIG_FILE)
