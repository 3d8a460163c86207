"""One optimizer step: the gradient of a global batch, whether it is finite, and the update of the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shortcutflow.conditions import select
from shortcutflow.config import RunConfig
from shortcutflow.distributed import World
from shortcutflow.dtensor import full_tensor, to_local
from shortcutflow.ema import copy_weights
from shortcutflow.seeds import generator_for
from shortcutflow.train.heartbeat import Heartbeat
from shortcutflow.train.resume import Position
from shortcutflow.train.state import TrainState
from shortcutflow.types import Batch, BatchSlice, LossReport, Network


def forward_backward(
    config: RunConfig, state: TrainState, world: World, batch: Batch, position: Position, step: int,
    heartbeat: Heartbeat,
) -> list[LossReport]:  # fmt: skip
    """Leave the gradient of the global batch's mean loss in the network; returns a report for each accumulated part.

    The random numbers are those of the global batch in one piece, however many ranks and parts share it.
    """
    refresh_teacher(config, state, position, step)
    settings, reports = config.training, []
    for part in range(settings.accumulation):
        heartbeat.beat(step, "objective")
        rows = slice(part, None, settings.accumulation)
        here = BatchSlice(world.rank + part * world.size, world.size * settings.accumulation)
        draws = generator_for(config.seed, "objective", step=step, device=world.device)
        bfloat16 = settings.precision == "bfloat16"
        with grad_sync(state.net, enabled=part == settings.accumulation - 1):
            with torch.autocast(world.device.type, torch.bfloat16) if bfloat16 else nullcontext():
                report = state.objective(
                    state.net, batch.data[rows], select(batch.y, rows),
                    target_net=state.target_net, teacher=state.teacher_net,
                    progress=position.progress_at(step, settings.steps),
                    null_y=state.info.null_y, generator=draws, batch_slice=here, noise=select(batch.noise, rows),
                )  # fmt: skip
            heartbeat.beat(step, "backward")
            report.loss.backward(torch.full_like(report.loss, 1 / settings.accumulation))
        reports.append(report)
    return reports


@contextmanager
def grad_sync(net: Network, *, enabled: bool) -> Iterator[None]:
    """Whether a backward pass in here sums the gradients over all ranks, or leaves that to the batch's last part."""
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(enabled)
    with nullcontext() if enabled or not hasattr(net, "no_sync") else net.no_sync():
        yield


def refresh_teacher(config: RunConfig, state: TrainState, position: Position, step: int) -> None:
    """Where the objective's next stage begins: the network that makes targets becomes the teacher."""
    if state.teacher is None or step == 0:
        return
    before, now = (position.progress_at(at, config.training.steps) for at in (step - 1, step))
    if config.objective.teacher_stage(now) > config.objective.teacher_stage(before):
        copy_weights(state.teacher, state.weights(config.target_weights))


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """The norm of all gradients over all ranks, 0-d, before they are scaled down to max_norm, if one is given."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return full_tensor(norm)


def step_if_finite(
    optimizer: torch.optim.Optimizer, world: World, reports: list[LossReport], grad_norm: Tensor, stop_requested: bool
) -> tuple[bool, bool]:
    """Update the weights, unless a rank has a loss or gradient that is not finite.

    The one exchange and the one wait for the device in a step. The optimizer's kernels are launched before the wait, so
    that the device is busy while the host goes on; they read the flag on the device, as those of a GradScaler do.

    Args:
        optimizer: a fused AdamW, which leaves weights and state alone where its ``found_inf`` is 1.
        world: all its ranks call this together.
        reports, grad_norm: of this rank.
        stop_requested: whether this rank has received a signal.

    Returns:
        Whether the step was not finite, and whether any rank has received a signal.
    """
    values = torch.stack([*(report.loss.detach() for report in reports), grad_norm])
    flags = torch.full((2,), float(stop_requested), device=values.device)
    flags[0] = (values - values).any()  # 0 for what is finite, NaN otherwise; isfinite() would be four kernels
    flags = world.max(flags)
    on_host = flags.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None
    optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
    optimizer.step()
    if copied is not None:
        copied.synchronize()
    is_bad, stopping = on_host.tolist()
    return bool(is_bad), bool(stopping)


class UpdateNorms:
    """Norms of the weights and of what one step changes in them. Built before the step, taken after it.

    Args:
        optimizer: of the weights.
        sum_over_shards: sums a 0-d tensor over the ranks among which the weights are sharded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sum_over_shards: Callable[[Tensor], Tensor]) -> None:
        self._weights = [to_local(p) for group in optimizer.param_groups for p in group["params"]]
        self._sum = sum_over_shards
        self._before = [weight.detach().clone() for weight in self._weights]

    def take(self) -> dict[str, float]:
        """``parameter_norm`` before the step and ``update_norm``."""
        pairs = zip(self._before, self._weights, strict=True)
        squares = [torch.stack([old.square().sum(), (new - old).square().sum()]) for old, new in pairs]
        weights, update = self._sum(torch.stack(squares).sum(0).detach()).sqrt().tolist()
        return {"parameter_norm": weights, "update_norm": update}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def arithmetic(*, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Set PyTorch's process-wide arithmetic, and restore it at the end.

    Args:
        tf32: float32 products on a GPU use tensor cores with 10 bits of mantissa.
        deterministic: kernels repeat their sums in the same order; an operator that has no such kernel raises an error.
    """
    cudnn: Any = torch.backends.cudnn
    precisions: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [each.fp32_precision for each in precisions]
    was_deterministic, was_benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for each in precisions:
            each.fp32_precision = "tf32" if tf32 else "ieee"
        if deterministic:
            # cuBLAS reads it when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        cudnn.benchmark = was_benchmark
        for each, precision in zip(precisions, before, strict=True):
            each.fp32_precision = precision
