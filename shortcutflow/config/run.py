"""The complete description of a run: strict, frozen, saved resolved beside its results."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from shortcutflow.config.evaluation import EvaluationConfig
from shortcutflow.config.training import TrainingConfig
from shortcutflow.coupling import TransportCoupling
from shortcutflow.data import DataConfig
from shortcutflow.data.source import DataInfo
from shortcutflow.ema import AnyEMAConfig, EMAConfig
from shortcutflow.io.atomic import write_whole
from shortcutflow.io.json import read_object, wrong_fields
from shortcutflow.network import BackboneConfig, build_network
from shortcutflow.objectives import Context, ObjectiveConfig
from shortcutflow.old_names import renamed
from shortcutflow.optim import OptimizerConfig
from shortcutflow.seeds import seed_for
from shortcutflow.types import BatchSlice

CONFIG_FILE = "config.json"
CURRENT = "current"
"""In place of an EMA's name: the weights themselves."""
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""Of a run or a model: a folder or a hub id."""


class RunConfig(BaseModel):
    """One training run.

    Args:
        name: of the run's folder.
        seed: of everything random.
        data, backbone, objective, optimizer, training: what they say.
        coupling: which noise belongs to which sample; None draws them independently, as the paper does.
        emas: EMAs of the weights, by name.
        target_weights: what makes bootstrap targets: an EMA's name or "current".
        sample_weights: what is sampled and evaluated: likewise.
        teacher: for objectives that learn from a trained network: the folder of its run or model, or its hub id.
        start: likewise, whose weights training begins with. If it knows the flow alone, step sizes change nothing
            until they are trained. None is the teacher with its weights as they are, at random for step sizes that it
            never saw; or a new network without a teacher.
        evaluation: what is measured at the end; None nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    backbone: BackboneConfig
    objective: ObjectiveConfig
    coupling: TransportCoupling | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    emas: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], AnyEMAConfig] = {"ema": EMAConfig()}
    target_weights: str = "ema"
    sample_weights: str = "ema"
    teacher: Place | None = None
    start: Place | None = None
    training: TrainingConfig
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        return renamed(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        for field in ("target_weights", "sample_weights"):
            chosen = getattr(self, field)
            if chosen != CURRENT and chosen not in self.emas:
                known = ", ".join([*self.emas, CURRENT])
                raise ValueError(f"{field} is {chosen!r}; known: {known}")
        if self.objective.needs_teacher != (self.teacher is not None):
            needs = "needs teacher=FOLDER, a run" if self.objective.needs_teacher else "takes no teacher"
            raise ValueError(f"objective {self.objective.kind!r} {needs}; teacher is {self.teacher}")
        check_rows(
            self.objective, self.training.global_batch_size, self.training.accumulation,
            coupled=self.coupling is not None,
        )  # fmt: skip
        return self

    @property
    def finest_steps(self) -> int:
        """M of the objective; 128 for one that has none."""
        return getattr(self.objective, "finest_steps", 128)

    def check_conditions(self, info: DataInfo) -> None:
        """Raise ValueError for settings that need conditions where the data has none."""
        if info.null_y is not None:
            return
        settings = {"objective.condition_dropout": self.objective.condition_dropout > 0}
        for section in ("objective", "evaluation"):
            settings[f"{section}.max_guidance"] = getattr(getattr(self, section), "max_guidance", 1) != 1
            settings[f"{section}.guidance_scale"] = getattr(getattr(self, section), "guidance_scale", 1) != 1
        if used := [name for name, is_used in settings.items() if is_used]:
            raise ValueError(
                f"{' and '.join(used)} need labels or other conditions, and the data has none: "
                "use condition_dropout=0 and guidance_scale=1, or data with labels"
            )

    def build_network(
        self, info: DataInfo | None = None, *, finest_steps: int | None = None, wrapped: bool = True
    ) -> nn.Module:
        """The run's network at step 0, fitting its data and objective.

        Args:
            info: what it fits; None for what the data says.
            finest_steps: M; None is the objective's.
            wrapped: with the parameters of the objective's own, if it has any.
        """
        info = info or self.data.describe()
        network = build_network(
            self.backbone,
            shape=info.shape,
            num_classes=info.num_classes,
            condition_shape=info.condition_shape,
            finest_steps=finest_steps or self.finest_steps,
            seed=self.seed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "objective's parameters"))
            return self.objective.wrap(network) if wrapped else network

    def sampler_options(self, info: DataInfo | None = None) -> dict[str, Any]:
        """What a sampler of this run's network must know: null_y, finest_steps, flow_only and which sampler it is."""
        return {
            "sampler": self.objective.sampler,
            "null_y": (info or self.data.describe()).null_y,
            "finest_steps": self.finest_steps,
            "flow_only": not self.objective.step_conditioned,
        }

    def save(self, run_dir: Path) -> None:
        """Write it into the run's folder, whole or not at all."""
        write_whole(run_dir / CONFIG_FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, run_dir: Path) -> RunConfig:
        """Read it from a run's folder.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if the file does not describe one.
        """
        path = run_dir / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{run_dir} is not a run: it holds no {CONFIG_FILE}")
        return validated(read_object(path, "a run"), where=str(path))


def check_rows(objective: Any, batch_size: int, slices: int, *, coupled: bool = False) -> None:
    """Raise ValueError where a batch, cut into slices, is too small for the rows of an objective, or where noise
    is coupled with its samples and the objective draws its own.
    """
    # The objective's own rule, on samples of one number: what it draws is thrown away.
    generator, rows = torch.Generator(), torch.zeros(batch_size // slices, 1)
    for number, progress in itertools.product({0, slices - 1}, (0.0, 1.0)):
        context = Context(progress=progress, batch_slice=BatchSlice(number, slices), noise=rows if coupled else None)
        objective.draw(rows, generator, context)


def validated(values: dict[str, Any], *, where: str) -> RunConfig:
    """A RunConfig from plain values; what is wrong comes as one ValueError with a line a field."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {wrong_fields(error)}") from error
