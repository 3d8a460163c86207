"""What is measured when training ends: the interface, and the kinds that there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from shortcutflow.plugins import Kinds

if TYPE_CHECKING:
    from shortcutflow.config.run import RunConfig
    from shortcutflow.models.model import Model


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
    def run(self, model: Model, config: RunConfig) -> Mapping[str, Any] | None:
        """Measure what a run has trained, on the device of its network.

        Args:
            model: the network, with what its sampler must know; its ``folder`` is the run's.
            config: the run's.

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
