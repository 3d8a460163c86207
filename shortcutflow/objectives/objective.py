"""What all objectives share: the call. And what the paper's baselines share: draws of one step size, their costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from torch import Generator, Tensor

from shortcutflow.objectives.regression import ObjectiveSettings, as_batch, regress
from shortcutflow.schedule import draw_times_on_grid, levels_of
from shortcutflow.seeds import draw_noise_rows, generator_or_default
from shortcutflow.types import WHOLE, LossReport, Mean, Network, Share, Targets


def _power_of_two(value: int) -> int:
    levels_of(value)
    return value


FinestSteps = Annotated[int, AfterValidator(_power_of_two), Field(description="M: the smallest step size is 1/M")]
GuidanceScale = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="guidance of the network that makes the targets; 1 is none")
]


@dataclass(frozen=True)
class StepDraw:
    """The random numbers of one evaluation whose rows all have one step size.

    Attributes:
        noise: x_0, (b, *shape).
        t: (b,) float32, multiples of size.
        dropped: (b,) bool, rows that lose their condition.
        size: the step d.
    """

    noise: Tensor
    t: Tensor
    dropped: Tensor
    size: float


class TrainingObjective(ObjectiveSettings, ABC):
    """Base of the objectives: three steps, and the call that takes them one after the other."""

    @abstractmethod
    def draw(
        self,
        data: Tensor,
        *,
        generator: Generator | None = None,
        progress: float | None = None,
        share: Share = WHOLE,
    ) -> Any:
        """Take every random number of one evaluation on a batch of data (b, *shape), or on a share of a batch.

        Args:
            data: gives shape, type and device.
            generator: on data's device; None is torch's default generator, which ``torch.manual_seed`` seeds.
            progress: share of the training that is done, in [0, 1], for methods with a schedule.
            share: which rows of the global batch data is: they get the numbers that the whole batch would give them.
                Numbers of a few bytes a row are drawn for the whole batch, noise for the share alone.
        """

    @abstractmethod
    def targets(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None,
        draw: Any,
        *,
        teacher: Network | None = None,
        null_y: Tensor | float | None = None,
    ) -> Targets:
        """The rows of the regression; deterministic, without gradient."""

    def __call__(
        self,
        net: Network,
        data: Tensor,
        y: Tensor | None = None,
        *,
        target_net: Network | None = None,
        teacher: Network | None = None,
        progress: float | None = None,
        null_y: Tensor | float | None = None,
        generator: Generator | None = None,
        share: Share = WHOLE,
    ) -> LossReport:
        """The loss of net on a batch, or on a share of one.

        Args:
            net: the network to train, called as net(x_t, t, d, y).
            data: x_1, (b, *shape), float; converted to the precision of a float32 network.
            y: labels (b,) as a tensor, array or list of whole numbers, any condition tensor (b, ...), or None.
            target_net: makes targets where the network itself does: usually its EMA; None is net itself.
            teacher: the trained network that two-phase methods learn from.
            progress: share of the training that is done, in [0, 1], for methods with a schedule.
            null_y: the condition that stands for "none": needed for condition_dropout and guidance.
            generator: where the random numbers come from, on data's device; None is torch's default generator.
            share: which rows of the global batch data is; they get the numbers that the whole would give them.

        Raises:
            ValueError: for a missing teacher, progress or null_y, or shapes that do not fit together.
        """
        data, y = as_batch(net, data, y)
        generator = generator_or_default(generator, data.device)
        draw = self.draw(data, generator=generator, progress=progress, share=share)
        maker = net if target_net is None else target_net
        return regress(net, self.targets(maker, data, y, draw, teacher=teacher, null_y=null_y))

    def draw_steps(self, data: Tensor, size: float, generator: Generator | None, share: Share) -> StepDraw:
        """Noise, times that are multiples of size, and dropped conditions."""
        b, device = len(data) * share.total, data.device
        generator = generator_or_default(generator, device)
        return StepDraw(
            noise=noise_for(data, generator, share),
            t=draw_times_on_grid(b, size, generator=generator, device=device)[share.rows],
            dropped=self.draw_dropped(b, generator, device)[share.rows],
            size=size,
        )


def noise_for(data: Tensor, generator: Generator, share: Share) -> Tensor:
    """Noise like data, which is a share of a batch; see :func:`shortcutflow.seeds.draw_noise_rows`."""
    return draw_noise_rows(len(data), data.shape[1:], generator, share, dtype=data.dtype, device=data.device)


def require_shared_evenly(n: int, share: Share, rows: str, *, exactly: bool) -> None:
    """Raise ValueError if shares of a batch would have none of its n special rows, or unequal numbers of them."""
    if exactly and n % share.total:
        raise ValueError(
            f"the released rows need {rows} rows that {share.total} shares divide, there are {n}: a share is a "
            "process's batch, or one of its accumulation's parts"
        )
    if 0 < n < share.total:
        raise ValueError(
            f"{n} {rows} rows cannot be shared by {share.total} parts (processes times accumulation): "
            "use larger batches"
        )


def require_teacher(teacher: Network | None, kind: str) -> Network:
    """Give the teacher back, or raise ValueError."""
    if teacher is None:
        raise ValueError(f"{kind} learns from a trained network: pass it as teacher=")
    return teacher


def require_progress(progress: float | None, kind: str) -> float:
    """Give progress back, or raise ValueError unless it is in [0, 1]."""
    if progress is None or not 0 <= progress <= 1:
        raise ValueError(
            f"{kind} follows a schedule: pass progress=step/total_steps, a number from 0 to 1, got {progress!r}"
        )
    return progress


def stage_of(progress: float | None, stages: int, kind: str) -> int:
    """floor(progress * stages): how many equal parts of the training are over, from 0 to stages.

    Raises:
        ValueError: without a progress in [0, 1].
    """
    # step/total may round down just below the stage that begins there.
    return int(require_progress(progress, kind) * stages + 1e-9)


def guided_evaluations(scale: float) -> int:
    """Forward evaluations that a guided velocity costs."""
    return 1 if scale in (0, 1) else 2


def magnitudes(**velocities: Tensor) -> dict[str, Mean]:
    """Root mean squares over all entries of velocities (r, *shape), as metrics v_magnitude_*; r may be 0."""
    return {
        f"v_magnitude_{name}": Mean(v.float().square().flatten(1).mean(1).sum(), len(v), root=True)
        for name, v in velocities.items()
    }
