"""What to say when a step is not finite: which loss, which step size, which samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from shortcutflow.distributed import World
from shortcutflow.train import checkpoint
from shortcutflow.train.checkpoint import Saver, SavingError
from shortcutflow.types import Batch, LossReport

MOST_SKIPPED_IN_A_ROW = 20
"""Steps that may be skipped one after the other; then the run stops all the same."""


class NonFiniteError(RuntimeError):
    """Data, loss or gradient is NaN or infinite; the weights are those of the step before."""


def what_is_not_finite(batch: Batch, reports: Sequence[LossReport]) -> list[str]:
    """A sentence for each fault that this process sees, in its data and in the rows of its losses."""
    faults = []
    bad_data = (~batch.data.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad_data:
        faults.append(f"the data of {', '.join(batch.keys[i] for i in bad_data[:5])} is not finite")
    for part, report in enumerate(reports):
        # Part p of n has samples p, p + n, ...
        keys = batch.keys[part :: len(reports)]
        for i in (~report.row_loss.isfinite()).nonzero().flatten().tolist()[:5]:
            kind = "bootstrap" if i < report.targets.n_bootstrap else "flow"
            sample = i if report.targets.source is None else int(report.targets.source[i])
            d, t = float(report.targets.d[i]), float(report.targets.t[i])
            faults.append(f"{kind} loss {float(report.row_loss[i]):g} at d = {d:g}, t = {t:g} of sample {keys[sample]}")
    return faults


class BadSteps:
    """What becomes of steps whose loss or gradient is not finite: the run stops, or they are skipped and counted.

    Args:
        stop: end the run at the first one.
        skipped: how many a resumed run had skipped.
        world: all its processes call :meth:`skip_or_stop` together.
        saver: whose newest checkpoint is named when the run ends.
    """

    def __init__(self, *, stop: bool, skipped: int, world: World, saver: Saver) -> None:
        self._stop, self._world, self._saver = stop, world, saver
        self.skipped, self._in_a_row = skipped, 0

    def step_was_good(self) -> None:
        """A step was made."""
        self._in_a_row = 0

    def skip_or_stop(self, step: int, batch: Batch, reports: Sequence[LossReport], grad_norm: Tensor) -> str:
        """Count a bad step; gives what there is to say of it.

        Raises:
            NonFiniteError: if the run ends with it.
        """
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        said = [f"step {step + 1}: not finite (loss {float(mean_loss(reports)):g}, gradient norm {float(grad_norm):g})"]
        for rank, faults in enumerate(self._world.gather(what_is_not_finite(batch, reports))):
            said += [f"rank {rank}: {fault}" if self._world.size > 1 else fault for fault in faults]
        said.append("the weights were not changed")
        if not self._stop and self._in_a_row <= MOST_SKIPPED_IN_A_ROW:
            return "; ".join([*said, f"the step is skipped, {self.skipped} so far"])
        if self._in_a_row > 1:
            said.append(f"{self._in_a_row} steps in a row were skipped")
        with suppress(SavingError):  # then it is the one before
            self._saver.wait()
        last = checkpoint.latest_in(self._saver.folder)
        said.append(f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before")
        raise NonFiniteError("; ".join(said))


def mean_loss(reports: Sequence[LossReport]) -> Tensor:
    """Of the parts of a batch, 0-d."""
    return torch.stack([report.loss.detach() for report in reports]).mean()
