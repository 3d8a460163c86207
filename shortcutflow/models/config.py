"""A model's folder: what its network is, as JSON, and its weights, as safetensors. Nothing in it is code.

::

    config.json                  the network, its samples' shape, its conditions, which weights there are
    weights.safetensors          the weights as training left them ("current")
    weights_NAME.safetensors     an EMA of them, for example weights_ema.safetensors

A run's folder is one too: its config says the same in more words, and its weights are those it is sampled with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from shortcutflow.config import CONFIG_FILE, CURRENT, RunConfig
from shortcutflow.data.manifest import LatentsInfo
from shortcutflow.data.source import DataInfo
from shortcutflow.io.json import read_object, wrong_fields
from shortcutflow.network import BackboneConfig, build_network
from shortcutflow.types import SamplerKind

REPORTS = "evaluation*.json"
COMPANIONS = (REPORTS, "samples.png")
"""What else a folder may hold that is worth keeping with a model."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Size = Annotated[int, Field(ge=1)]


class ModelConfig(BaseModel):
    """All that sampling needs to know of a model.

    Args:
        format, version: of this file.
        backbone: the network's registered name and its builder's options.
        shape: of a sample.
        num_classes: labels, or None.
        condition_shape: of the tensor a sample is conditioned on, or None.
        null_y: the null condition, for guidance.
        finest_steps: M of the training.
        flow_only: the network was trained without step sizes, as a flow.
        sampler: that the network is made for, see :func:`shortcutflow.sample`.
        weights: the names of the weights in the folder; "current" and those of EMAs.
        default_weights: which of them are loaded by default.
        step: optimizer steps done, as the training counted them, if known.
        vae: hub id or folder of the autoencoder whose latents the samples are, or None.
        latents: how they were made, with the SHA-256 of the autoencoder's weights, if known.
        about: anything else worth saying, by topic.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["shortcutflow-model"] = "shortcutflow-model"
    version: Literal[1] = 1
    backbone: BackboneConfig
    shape: tuple[Size, ...]
    num_classes: Size | None = None
    condition_shape: tuple[Size, ...] | None = None
    null_y: float | None = None
    finest_steps: int = Field(default=128, ge=2)
    flow_only: bool = False
    sampler: SamplerKind = "euler"
    weights: tuple[Name, ...]
    default_weights: Name
    step: int | None = Field(default=None, ge=0)
    vae: str | None = None
    latents: LatentsInfo | None = None
    about: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_its_default(self) -> ModelConfig:
        if self.default_weights not in self.weights:
            raise ValueError(f"default_weights is {self.default_weights!r}; weights: {', '.join(self.weights)}")
        return self

    @property
    def info(self) -> DataInfo:
        """Shape and conditions of a sample."""
        return DataInfo(self.shape, self.num_classes, self.condition_shape, self.vae, self.latents)

    def build_network(self) -> nn.Module:
        """The network with new weights, always the same.

        Raises:
            ValueError: for an unknown backbone, listing the installed ones, or options it does not take.
        """
        return build_network(
            self.backbone, shape=self.shape, num_classes=self.num_classes, condition_shape=self.condition_shape,
            finest_steps=self.finest_steps, seed=0,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / CONFIG_FILE).write_text(self.model_dump_json(indent=2) + "\n")


def weights_file(name: str) -> str:
    """The file that holds the weights of this name."""
    return "weights.safetensors" if name == CURRENT else f"weights_{name}.safetensors"


def read_config(folder: Path) -> ModelConfig | RunConfig:
    """The config of a model's or a run's folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it describes neither.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG_FILE} in it")
    values = read_object(path, "a model")
    if "format" not in values:
        return RunConfig.load(folder)
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path} describes no model: {wrong_fields(error, most=5)}") from error


def config_of_run(run: RunConfig, info: DataInfo, *, weights: str, step: int | None) -> ModelConfig:
    """What sampling needs to know of a run on such data with these weights."""
    return ModelConfig(
        backbone=run.backbone, **info._asdict(), **run.sampler_options(info),
        weights=(weights,), default_weights=weights, step=step,
        about={"run": run.name, "objective": run.objective.kind, "data": run.data.kind},
    )  # fmt: skip
