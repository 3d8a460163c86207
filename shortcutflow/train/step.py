"""One optimizer step: the gradient of a global batch, whether it can be used, and its use."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from shortcutflow.conditions import select
from shortcutflow.config import RunConfig
from shortcutflow.distributed import World
from shortcutflow.seeds import generator_for
from shortcutflow.train.faults import mean_loss
from shortcutflow.train.heartbeat import Heartbeat
from shortcutflow.train.optim import UpdateNorms
from shortcutflow.train.parts import Parts, gradients, refresh_teacher
from shortcutflow.train.position import Position
from shortcutflow.types import Batch, BatchSlice, LossReport


def backward_pass(
    config: RunConfig, parts: Parts, world: World, batch: Batch, position: Position, step: int, heartbeat: Heartbeat
) -> list[LossReport]:
    """Leave the gradient of the global batch's mean loss in the network; gives a report for each part of the batch.

    The random numbers are those of the global batch in one piece, however many processes and parts share it.
    """
    refresh_teacher(config, parts, position, step)
    settings, reports = config.training, []
    for part in range(settings.accumulation):
        heartbeat.beat(step, "objective")
        rows = slice(part, None, settings.accumulation)
        here = BatchSlice(world.rank + part * world.size, world.size * settings.accumulation)
        draws = generator_for(config.seed, "objective", step=step, device=world.device)
        bfloat16 = settings.precision == "bfloat16"
        with gradients(parts.net, added_up=part == settings.accumulation - 1):
            with torch.autocast(world.device.type, torch.bfloat16) if bfloat16 else nullcontext():
                report = config.objective(
                    parts.net, batch.data[rows], select(batch.y, rows),
                    target_net=parts.target_net, teacher=parts.teacher_net,
                    progress=position.progress_at(step, settings.steps),
                    null_y=parts.info.null_y, generator=draws, batch_slice=here,
                )  # fmt: skip
            heartbeat.beat(step, "backward")
            (report.loss / settings.accumulation).backward()
        reports.append(report)
    return reports


def agree(world: World, reports: list[LossReport], grad_norm: Tensor, stop_requested: bool) -> tuple[bool, bool]:
    """Whether any process has a number that is not finite, and whether any was told to stop.

    The one exchange and the one wait for the device in a step, before anything reaches the weights.
    """
    bad = ~torch.stack([mean_loss(reports), grad_norm]).isfinite().all()
    bad, stopping = world.max(torch.stack([bad.float(), bad.new_full((), stop_requested).float()])).tolist()
    return bool(bad), bool(stopping)


def update(parts: Parts, step: int, norms: UpdateNorms | None) -> dict[str, float]:
    """Move the weights and their EMAs; returns the norms, if they are to be taken."""
    parts.optimizer.step()
    for ema in parts.emas.values():
        ema.update(parts.network, step)
    return norms.take() if norms is not None else {}
