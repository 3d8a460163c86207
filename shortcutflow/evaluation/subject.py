"""What is evaluated: a network with all that sampling it and naming it takes, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shortcutflow.data import DataConfig
from shortcutflow.data.autoencoder import weights_sha256
from shortcutflow.data.source import DataInfo
from shortcutflow.run_dir import Run
from shortcutflow.types import Network, SamplerKind


@dataclass(frozen=True)
class Subject:
    """A network, ready to sample, on one device.

    Attributes:
        name: for reports.
        network: in eval mode.
        info: shape of a sample, its conditions, and the autoencoder whose latents samples are.
        device: of the network.
        identity: what tells it from any other, as JSON: the network's description and the SHA-256 of its weights.
            Samples that were kept are used again only for the same.
        weights: an average's name, "current", or a file's.
        step: optimizer steps done, or None if nobody knows.
        finest_steps, null_y, flow_only, sampler: see :func:`shortcutflow.sample`.
        data: what it was trained on, or None.
        folder: where it came from, and where a report goes; or None.
    """

    name: str
    network: Network
    info: DataInfo
    device: torch.device
    identity: Mapping[str, Any]
    weights: str = "current"
    step: int | None = None
    finest_steps: int = 128
    null_y: float | None = None
    flow_only: bool = False
    sampler: SamplerKind = "euler"
    data: DataConfig | None = None
    folder: Path | None = None

    def sampler_options(self) -> dict[str, Any]:
        """What the sampler must know of this network."""
        return {
            "sampler": self.sampler,
            "null_y": self.null_y,
            "finest_steps": self.finest_steps,
            "flow_only": self.flow_only,
        }


def subject_of_run(run: Run) -> Subject:
    """A run's network with the weights it was loaded with."""
    config = run.config
    identity = {"network": config.backbone.model_dump(), "weights_sha256": weights_sha256(run.network.state_dict())}
    return Subject(
        name=config.name, network=run.network, info=run.info,
        device=next(run.network.parameters()).device, identity=identity, weights=run.weights, step=run.step,
        data=config.data, folder=run.folder, **config.sampler_options(run.info),
    )  # fmt: skip
