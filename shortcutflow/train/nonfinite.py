"""What happens in a step that is not finite: an error, or a skipped step, that names loss, step size and samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from shortcutflow.checkpoint import latest_in
from shortcutflow.distributed import World
from shortcutflow.train.checkpoint_writer import CheckpointWriter, SavingError
from shortcutflow.types import Batch, LossReport

MAX_SKIPPED_IN_A_ROW = 20
"""Steps that may be skipped one after the other; then the run stops all the same."""


class NonFiniteError(RuntimeError):
    """Data, loss or gradient is NaN or infinite; the weights are those of the step before."""


class NonFiniteGuard:
    """Stops the run at a step whose loss or gradient is not finite, or skips and counts it.

    Args:
        stop: end the run at the first one.
        skipped: steps that a resumed run had skipped.
        world: all its ranks call :meth:`on_nonfinite` together.
        writer: the newest checkpoint of it is named when the run ends.
    """

    def __init__(self, *, stop: bool, skipped: int, world: World, writer: CheckpointWriter) -> None:
        self._stop, self._world, self._writer = stop, world, writer
        self.skipped, self._in_a_row = skipped, 0

    def on_finite(self) -> None:
        """The step was finite."""
        self._in_a_row = 0

    def on_nonfinite(self, step: int, batch: Batch, reports: Sequence[LossReport], grad_norm: Tensor) -> str:
        """Count a step that is not finite; returns the message.

        Raises:
            NonFiniteError: if the run ends with it.
        """
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        loss = float(mean_loss(reports))
        message = [f"step {step + 1}: not finite (loss {loss:g}, gradient norm {float(grad_norm):g})"]
        for rank, found in enumerate(self._world.gather(nonfinite_rows(batch, reports))):
            message += [f"rank {rank}: {row}" if self._world.size > 1 else row for row in found]
        message.append("the weights were not changed")
        if not self._stop and self._in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return "; ".join([*message, f"the step is skipped, {self.skipped} so far"])
        if self._in_a_row > 1:
            message.append(f"{self._in_a_row} steps in a row were skipped")
        with suppress(SavingError):  # the newest is then the one before
            self._writer.wait()
        last = latest_in(self._writer.folder)
        message.append(f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before")
        raise NonFiniteError("; ".join(message))


def nonfinite_rows(batch: Batch, reports: Sequence[LossReport]) -> list[str]:
    """A sentence for the data and each of the first losses of this rank that are not finite."""
    found = []
    bad_data = (~batch.data.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad_data:
        found.append(f"the data of {', '.join(batch.keys[i] for i in bad_data[:5])} is not finite")
    for part, report in enumerate(reports):
        # Part p of n has samples p, p + n, ...
        keys = batch.keys[part :: len(reports)]
        for i in (~report.row_loss.isfinite()).nonzero().flatten().tolist()[:5]:
            kind = "bootstrap" if i < report.targets.n_bootstrap else "flow"
            sample = i if report.targets.source is None else int(report.targets.source[i])
            d, t = float(report.targets.d[i]), float(report.targets.t[i])
            found.append(f"{kind} loss {float(report.row_loss[i]):g} at d = {d:g}, t = {t:g} of sample {keys[sample]}")
    return found


def mean_loss(reports: Sequence[LossReport]) -> Tensor:
    """The mean loss of the accumulated parts of a batch, 0-d."""
    return torch.stack([report.loss.detach() for report in reports]).mean()
