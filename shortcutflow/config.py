"""The complete description of a run: strict, frozen, saved resolved beside its results."""

from __future__ import annotations

import difflib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from torch import nn

from shortcutflow import plugins
from shortcutflow.data import DATA_SOURCES, DataConfig
from shortcutflow.data.source import DataInfo
from shortcutflow.ema import AnyEMAConfig, EMAConfig
from shortcutflow.io.atomic import write_whole
from shortcutflow.io.json import read_object
from shortcutflow.network import BackboneConfig, build_network
from shortcutflow.objectives import OBJECTIVES, Context, ObjectiveConfig
from shortcutflow.old_names import renamed, renamed_path
from shortcutflow.optim import OptimizerConfig
from shortcutflow.plugins import Kinds
from shortcutflow.seeds import seed_for
from shortcutflow.types import BatchSlice

if TYPE_CHECKING:
    from shortcutflow.run_dir import Run

CONFIG_FILE = "config.json"
CURRENT = "current"
"""In place of an EMA's name: the weights themselves."""
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""Of a run or a model: a folder or a hub id."""


class TrainingConfig(BaseModel):
    """How long, how large, how often.

    Args:
        steps: optimizer steps in all.
        global_batch_size: samples an optimizer step, over all processes.
        accumulation: a process takes its share of a batch in so many equal parts, one after the other.
        precision: "bfloat16" runs the network under autocast; weights, gradients' sums, t and d stay float32.
        tf32: let float32 products on a GPU use its tensor cores, with 10 bits of mantissa.
        deterministic: on a GPU, use kernels that repeat bit for bit, and refuse operators that have none. Slower, by
            how much depends on the network; needless on a CPU.
        compile: run the network through torch.compile.
        gradient_checkpointing: run parts of the network again in the backward pass instead of keeping their insides;
            less memory, a third more time.
        parallel: how several processes share a run: "ddp", the whole network in each, or "fsdp", sharded (FSDP2).
        shard_group: processes that hold one sharded copy together, "fsdp" only; None is all of them. With 8 on
            machines of 8 GPUs, shards stay inside a machine and only gradients cross (hybrid sharding).
        device: "auto" is a GPU if there is one.
        log_every, grid_every, checkpoint_every: in steps; 0 never (the last step is always saved).
        keep_checkpoints: older ones are deleted,
        keep_checkpoint_every: but not those at multiples of so many steps; 0 keeps none of them.
        grid_steps: the sampling budgets of the sample grids.
        on_non_finite: what a loss or gradient that is not finite does: "stop" the run, or "skip" the step and count it.
        hang_timeout: seconds without progress after which a process says which rank all wait for, and ends; 0 never.
        loggers: what receives numbers and images beside ``metrics.jsonl``: "tensorboard", or names of the entry-point
            group ``shortcutflow.loggers``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    tf32: bool = True
    deterministic: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    shard_group: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(default=50, ge=1)
    grid_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=1000, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_checkpoint_every: int = Field(default=0, ge=0)
    grid_steps: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 128)
    on_non_finite: Literal["stop", "skip"] = "stop"
    hang_timeout: float = Field(default=1800, ge=0)
    loggers: tuple[str, ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainingConfig:
        if self.global_batch_size % self.accumulation:
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be taken in {self.accumulation} equal parts"
            )
        if self.shard_group is not None and self.parallel != "fsdp":
            raise ValueError(f"shard_group is for parallel 'fsdp', not {self.parallel!r}")
        return self


class EvaluationSettings(BaseModel, ABC):
    """Base of what a config can have measured when training ends.

    A subclass declares ``kind: Literal["NAME"] = "NAME"``. Another package's are found by the entry-point group
    ``shortcutflow.evaluations``: ``NAME = "module:Class"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_every_rank: ClassVar[bool] = False
    """Whether all ranks of a run take part in ``run``, or the first one alone."""

    kind: str

    def check(self, config: RunConfig) -> None:
        """Raise ValueError or ImportError, before training starts, if it cannot run for this config."""

    def smoke(self) -> Self | None:
        """The same with hardly any samples, for a smoke run; None if a smoke run measures nothing."""
        return self

    @abstractmethod
    def run(self, run: Run) -> Mapping[str, Any] | None:
        """Measure a trained run, on the device of its network.

        Returns:
            The report, which JSON can hold: "rows" has a mapping for each number of "steps" with its "values" by name
            and, if they were measured, "seconds" by phase. On ranks other than the first, anything.
        """


EVALUATIONS = Kinds(
    "evaluation",
    "shortcutflow.evaluations",
    EvaluationSettings,
    lazy={"protocol": "shortcutflow.evaluation.protocol_evaluation:ProtocolEvaluation"},
)
EvaluationConfig = Annotated[SerializeAsAny[EvaluationSettings], EVALUATIONS]


class RunConfig(BaseModel):
    """One training run.

    Args:
        name: of the run's folder.
        seed: of everything random.
        data, backbone, objective, optimizer, training: what they say.
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
        check_rows(self.objective, self.training.global_batch_size, self.training.accumulation)
        return self

    @property
    def finest_steps(self) -> int:
        """M of the objective; 128 for one that has none."""
        return getattr(self.objective, "finest_steps", 128)

    def check_conditions(self, info: DataInfo) -> None:
        """Raise ValueError where something is asked of conditions and the data has none."""
        if info.null_y is not None:
            return
        settings = {"objective.condition_dropout": self.objective.condition_dropout > 0}
        for section in ("objective", "evaluation"):
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
            info: what it fits; None asks the data.
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


def check_rows(objective: Any, batch_size: int, shares: int) -> None:
    """Raise ValueError where a batch is too small for the rows of an objective, shared by so many or at all."""
    # The objective's own rule, on samples of one number: what it draws is thrown away.
    generator, rows = torch.Generator(), torch.zeros(batch_size // shares, 1)
    for number, progress in itertools.product({0, shares - 1}, (0.0, 1.0)):
        context = Context(progress=progress, batch_slice=BatchSlice(number, shares))
        objective.draw(rows, generator, context)


def validated(values: dict[str, Any], *, where: str) -> RunConfig:
    """A RunConfig from plain values; what is wrong comes as one ValueError with a line a field."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "the run"
            lines.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}")
        raise ValueError(f"{where}: " + "; ".join(lines)) from error


OPEN_SECTIONS = {"data": DATA_SOURCES, "objective": OBJECTIVES, "evaluation": EVALUATIONS}
"""Sections of a run whose kinds other packages can add to."""


def with_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """A config with ``section.field=value`` applied; values are JSON, or else taken as text.

    A new ``kind`` of a section keeps the fields that both kinds have and gives the others their defaults.

    Raises:
        ValueError: for an override without "=", an unknown field (naming those there are), or an impossible value.
    """
    values = config.model_dump(mode="json")
    # A kind comes first: which fields a section has depends on it.
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".kind")):
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"an override has the form section.field=value, got {override!r}")
        _set(values, renamed_path(path), text)
    return validated(values, where="config")


def _set(values: dict[str, Any], path: str, text: str) -> None:
    *sections, field = path.split(".")
    here = values
    for i, section in enumerate(sections):
        if not isinstance(here.get(section), dict):
            raise ValueError(_unknown(path, ".".join([*sections[:i], section]), here, sections[:i]))
        here = here[section]
    free_form = bool(sections) and sections[-1] in ("options", "emas")
    kinds = _kinds_of(sections)
    # A section that has changed its kind lacks the fields that have no default.
    fields = kinds(here.get("kind")).model_fields if kinds is not None else {}
    if field not in here and not free_form and field not in fields:
        raise ValueError(_unknown(path, field, here, sections))
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if field == "kind" and kinds is not None and value != here["kind"]:
        _change_kind(here, kinds(value))
    else:
        here[field] = value


def _unknown(path: str, field: str, here: dict[str, Any], sections: list[str]) -> str:
    close = difflib.get_close_matches(field.rpartition(".")[2], list(here), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{path!r}: {'.'.join(sections) or 'a run'} has no field {field!r}; {hint}it has: {', '.join(here)}"


def _change_kind(here: dict[str, Any], to: type[BaseModel]) -> None:
    """Keep what the new kind of a section also has."""
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in to.model_fields.items()
        if not field.is_required()
    }
    kept = {name: value for name, value in here.items() if name in to.model_fields and name != "kind"}
    here.clear()
    here.update(defaults | kept)


def _kinds_of(sections: list[str]) -> Callable[[object], type[BaseModel]] | None:
    """Finds the settings class of a kind, for a section or an EMA that has kinds; None for any other."""
    if len(sections) == 1 and sections[0] in OPEN_SECTIONS:
        return OPEN_SECTIONS[sections[0]].find
    return _kind_of_ema if len(sections) == 2 and sections[0] == "emas" else None


def _kind_of_ema(kind: object) -> type[BaseModel]:
    known = {each.model_fields["kind"].default: each for each in get_args(AnyEMAConfig)}
    if kind not in known:
        raise ValueError(plugins.unknown("kind of EMA", kind, known))
    return known[kind]
