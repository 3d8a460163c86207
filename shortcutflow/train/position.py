"""How far a run is when its steps begin, and what follows from it for later steps."""

from __future__ import annotations

from typing import Any, NamedTuple


class Position(NamedTuple):
    """What a checkpoint says of a run besides tensors and data; by default the beginning.

    Attributes:
        step: optimizer steps done.
        skipped_steps: of them, how many were left out for numbers that were not finite.
        images_seen: samples of all processes, whatever the batch sizes were.
        anchor: a step and the share of training that was done before it. Schedules run on from here to the last step,
            so that a run resumed with another number of steps never falls back into a stage that is over.
    """

    step: int = 0
    skipped_steps: int = 0
    images_seen: int = 0
    anchor: tuple[int, float] = (0, 0.0)

    @classmethod
    def of(cls, step: int, state: dict[str, Any], steps: int) -> Position:
        """That of a checkpoint, for a run that goes on to ``steps``."""
        before = cls(step, state["skipped_steps"], state["images_seen"], tuple(state.get("anchor", (0, 0.0))))
        planned = state["config"]["training"]["steps"]
        if planned == steps or step == 0:
            return before
        return before._replace(anchor=(step - 1, before.progress_at(step - 1, planned)))

    def images_at(self, step: int, batch_size: int) -> int:
        """Samples seen after so many steps."""
        return self.images_seen + (step - self.step) * batch_size

    def progress_at(self, step: int, steps: int) -> float:
        """The share of training that is done before a step, in [0, 1]."""
        since, share = self.anchor
        return share + (1 - share) * (step - since) / (steps - since)
