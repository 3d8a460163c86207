"""The training loop: one flat function, its parts passed in from their own files."""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shortcutflow import __version__
from shortcutflow.config import CURRENT, RunConfig
from shortcutflow.data.stream import BatchStream, ShardStream
from shortcutflow.ema import Average
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.grids import sample_grid, save_picture
from shortcutflow.evaluation.runs import CHECKPOINTS
from shortcutflow.seeds import generator_for
from shortcutflow.train import checkpoint
from shortcutflow.train.checkpoint import NETWORK, OPTIMIZER, average_group
from shortcutflow.train.metrics import Averages, MetricsLog
from shortcutflow.train.optim import build_optimizer, set_lr
from shortcutflow.types import Batch, LossReport, Network


class NonFiniteError(RuntimeError):
    """Data, loss or gradient is NaN or infinite; the weights are those of the step before."""


class Parts(NamedTuple):
    """What training changes: everything a checkpoint has to hold."""

    network: nn.Module
    averages: dict[str, Average]
    optimizer: torch.optim.AdamW
    stream: BatchStream


def train(config: RunConfig, run_dir: Path, *, resume: bool = False) -> None:
    """Train a network and leave config, metrics, sample grids and checkpoints in the run's folder.

    Every random number is a function of (seed, step, purpose) and the data's position of the samples seen, so a run
    that was stopped and resumed has the same weights, bit for bit, as one that was not.

    Args:
        config: the run.
        run_dir: its folder; made if missing.
        resume: continue from the folder's newest checkpoint, if it has one.

    Raises:
        NonFiniteError: naming the step and the last good checkpoint; nothing of the bad step reaches the weights.
        ValueError: for parts that do not fit together.
    """
    require_one_process()
    device = pick_device(config.training.device)
    # A run that cannot be built leaves no folder behind.
    parts = build_parts(config, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    config.save(run_dir)
    start = _restore(parts, run_dir) if resume else 0
    settings, objective, info = config.training, config.objective, config.data.describe()
    net, target_net = _networks_to_call(config, parts)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if settings.precision == "bfloat16" else nullcontext()
    log, means = MetricsLog(run_dir, resume_at=start), Averages()
    last_log, bar = (start, time.perf_counter()), _progress_bar(start, settings.steps)

    for step in range(start, settings.steps):
        batch = next(parts.stream)
        lr = config.optimizer.lr_at(step, settings.steps)
        set_lr(parts.optimizer, lr)

        draws = generator_for(config.seed, "objective", step=step, device=device)
        with autocast:
            report = objective(net, batch.data, batch.y, target_net=target_net, null_y=info.null_y, generator=draws)
        report.loss.backward()
        grad_norm = clip_gradients(parts.optimizer, config.optimizer.max_grad_norm)

        if not torch.stack([report.loss.detach(), grad_norm]).isfinite().all():
            raise NonFiniteError(_what_is_not_finite(step, batch, report, grad_norm, run_dir))
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        for average in parts.averages.values():
            average.update(parts.network, step)

        done = step + 1
        means.add(report, grad_norm=grad_norm)
        bar.update()
        if done % settings.log_every == 0 or done == settings.steps:
            numbers, now = means.take(), time.perf_counter()
            numbers["lr"], numbers["images_seen"] = lr, done * settings.global_batch_size
            numbers["images_per_second"] = (done - last_log[0]) * settings.global_batch_size / (now - last_log[1])
            log.numbers(done, numbers)
            bar.set_postfix_str(f"loss {numbers['loss']:.3f}", refresh=False)
            last_log = done, now
        if info.is_picture and (done == settings.steps or (settings.grid_every and done % settings.grid_every == 0)):
            log.picture(done, "samples", _sample_grid(config, parts, run_dir, done))
        if done == settings.steps or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            _save(config, parts, run_dir, done)
    bar.close()
    log.close()


def require_one_process() -> None:
    """Raise ValueError under a launcher of several processes, which would each train the same run alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains on one process; start it with python, or "
            "with torchrun --nproc-per-node 1"
        )


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one.

    Raises:
        ValueError: for "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device is 'cuda', but torch finds no GPU here; use 'cpu' or 'auto'")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def build_parts(config: RunConfig, device: torch.device) -> Parts:
    """Network, averages, optimizer and data stream at step 0."""
    stream = ShardStream(
        config.data.prepare(), batch_size=config.training.global_batch_size, seed=config.seed,
        shuffle_buffer=config.data.shuffle_buffer, cache_bytes=config.data.cache_bytes, device=device,
    )  # fmt: skip
    network: Any = config.build_network().to(device)
    if config.training.gradient_checkpointing:
        if not hasattr(network, "gradient_checkpointing"):
            raise ValueError(f"backbone {config.backbone.name!r} has no gradient checkpointing")
        network.gradient_checkpointing = True
    averages = {name: Average(network, settings) for name, settings in config.averages.items()}
    return Parts(network, averages, build_optimizer(network.parameters(), config.optimizer), stream)


def _networks_to_call(config: RunConfig, parts: Parts) -> tuple[Network, Network]:
    """The network that is trained and the one that makes targets, compiled if asked."""
    target: nn.Module = parts.network
    if config.target_weights != CURRENT:
        target = parts.averages[config.target_weights].network
    if not config.training.compile:
        return parts.network, target
    # Both are called with fixed batch shapes: no dynamic ones.
    return torch.compile(parts.network, dynamic=False), torch.compile(target, dynamic=False)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """The norm of all gradients, before they are scaled down to max_norm, if one is given."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _progress_bar(start: int, steps: int) -> tqdm[Any]:
    # In a log file a line every half minute will do.
    return tqdm(
        total=steps, initial=start, desc="training", unit="step", mininterval=0.5 if sys.stderr.isatty() else 30
    )


def _what_is_not_finite(step: int, batch: Batch, report: LossReport, grad_norm: Tensor, run_dir: Path) -> str:
    """Step, loss, the samples at fault if it is the data, and the checkpoint to go back to."""
    bad_rows = (~batch.data.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    losses = ", ".join(f"{name} {float(value):g}" for name, value in report.metrics.items() if name.startswith("loss"))
    last = checkpoint.latest_in(run_dir / CHECKPOINTS)
    parts = [f"step {step + 1}: not finite ({losses}, gradient norm {float(grad_norm):g})"]
    if bad_rows:
        parts.append(f"the data of {', '.join(batch.keys[i] for i in bad_rows[:5])} is not finite")
    parts.append("the weights were not changed")
    parts.append(f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before")
    return "; ".join(parts)


def _sample_grid(config: RunConfig, parts: Parts, run_dir: Path, step: int) -> Any:
    """Samples from fixed noise, a row a budget, as a picture that is also saved."""
    network = parts.network if config.sample_weights == CURRENT else parts.averages[config.sample_weights].network
    info = config.data.describe()
    device = next(network.parameters()).device
    noise, labels = noise_of(config.seed, 10, info.shape, device), labels_of(10, info.num_classes, device)
    was_training = network.training
    network.eval()
    rows = [
        generate(network, noise, labels, steps=steps, **config.sampler_options())
        for steps in config.training.grid_steps
    ]
    network.train(was_training)
    picture = sample_grid(rows, [f"{steps}" for steps in config.training.grid_steps])
    folder = run_dir / "grids"
    folder.mkdir(exist_ok=True)
    save_picture(picture, str(folder / f"step_{step:08d}.png"))
    return picture


def _save(config: RunConfig, parts: Parts, run_dir: Path, step: int) -> None:
    groups = {
        NETWORK: parts.network.state_dict(),
        OPTIMIZER: checkpoint.optimizer_tensors(parts.optimizer, parts.network),
    }
    groups |= {average_group(name): average.network.state_dict() for name, average in parts.averages.items()}
    state = {
        "images_seen": step * config.training.global_batch_size,
        "data": parts.stream.state_dict(),
        "versions": {"shortcutflow": __version__, "torch": torch.__version__},
    }
    checkpoint.save(run_dir / CHECKPOINTS, step, groups, state)
    checkpoint.prune(run_dir / CHECKPOINTS, config.training.keep_checkpoints)


def _restore(parts: Parts, run_dir: Path) -> int:
    """Load the newest checkpoint; gives the optimizer steps it had done, 0 without one."""
    last = checkpoint.latest_in(run_dir / CHECKPOINTS)
    if last is None:
        return 0
    device = next(parts.network.parameters()).device
    parts.network.load_state_dict(last.tensors(NETWORK, device))
    for name, average in parts.averages.items():
        average.network.load_state_dict(last.tensors(average_group(name), device))
    checkpoint.load_optimizer(parts.optimizer, parts.network, last.tensors(OPTIMIZER, device))
    parts.stream.load_state_dict(last.state()["data"])
    return last.step
