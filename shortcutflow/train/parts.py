"""What a run consists of, and how several processes hold it: built, sharded, compiled, saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shortcutflow import __version__
from shortcutflow.config import CURRENT, RunConfig, check_rows
from shortcutflow.data.source import DataInfo
from shortcutflow.data.stream import BatchStream
from shortcutflow.distributed import World
from shortcutflow.ema import EMA, PowerFunctionEMAConfig, copy_weights
from shortcutflow.posthoc import write_snapshot
from shortcutflow.sharded import whole
from shortcutflow.train.checkpoint import (
    NETWORK,
    OPTIMIZER,
    TEACHER,
    Checkpoint,
    Saver,
    ema_group,
    optimizer_tensors,
)
from shortcutflow.train.optim import UpdateNorms, build_optimizer
from shortcutflow.train.parallel import mesh_of, replicate, shard, summed_over_shards
from shortcutflow.train.position import Position
from shortcutflow.train.speed import forward_flops
from shortcutflow.train.starts import load_start, new_teacher, open_teacher
from shortcutflow.types import Network

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Parts(NamedTuple):
    """What training changes: everything a checkpoint has to hold.

    Attributes:
        network, emas: as they are saved; sharded if the run is.
        optimizer: of the network.
        stream: this process's share of the data.
        teacher: what the second phase of two learns from, as it is saved; None without one.
        net, target_net, teacher_net: the networks as an objective calls them: compiled, in DistributedDataParallel, or
            as they are.
        teacher_finest_steps: M of the network that the teacher is built as; None without one.
        info: what the network fits; asked for once, since the answer may lie in a file far away.
        forward_flops: of one sample; None if unknown.
    """

    network: nn.Module
    emas: dict[str, EMA]
    optimizer: torch.optim.AdamW
    stream: BatchStream
    teacher: nn.Module | None
    net: Network
    target_net: Network
    teacher_net: Network | None
    teacher_finest_steps: int | None
    info: DataInfo
    forward_flops: int | None

    def weights(self, name: str) -> nn.Module:
        """The network of an EMA, or the one that is trained."""
        return self.network if name == CURRENT else self.emas[name].network


def build_parts(config: RunConfig, world: World, last: Checkpoint | None = None) -> Parts:
    """Network, EMAs, optimizer and data stream: equal weights in every process, or their shards.

    Without a checkpoint they are those of step 0. With one they are filled from it, so that the folders of the start
    and the teacher are not needed any more; how far the run is then, :class:`Position` says.

    All networks are made in host memory and then go to the device, so that their first weights are the same on any
    device and in any mode. Sharded, a device holds its shards and never more than one whole unit besides.

    Raises:
        ValueError: for parts that do not fit together, or a checkpoint of another run.
    """
    settings = config.training
    if settings.global_batch_size % (world.size * settings.accumulation):
        raise ValueError(
            f"a global batch of {settings.global_batch_size} cannot be shared equally by {world.size} processes that "
            f"take their shares in {settings.accumulation} parts"
        )
    check_rows(config.objective, settings.global_batch_size, world.size * settings.accumulation)
    stream = config.data.open_stream(
        batch_size=settings.global_batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
        device=world.device,
    )  # fmt: skip
    network: Any = config.build_network()
    if settings.gradient_checkpointing:
        if not hasattr(network, "gradient_checkpointing"):
            raise ValueError(f"backbone {config.backbone.name!r} has no gradient checkpointing")
        network.gradient_checkpointing = True
    info = config.data.describe()
    config.check_conditions(info)
    flops = forward_flops(network, info.num_classes)
    if last is None:
        opened = open_teacher(config)
        load_start(config, network, opened)
        teacher = opened.network if opened is not None else None
        teacher_finest_steps = opened.finest_steps if opened is not None else None
    else:
        teacher_finest_steps = last.state().get("teacher_finest_steps", config.finest_steps)
        teacher = new_teacher(config, teacher_finest_steps)
    sharded = settings.parallel == "fsdp"
    mesh = mesh_of(world, settings.shard_group) if sharded else None
    if teacher is not None:
        _place(teacher, config, world, mesh)
    emas = {}
    for name, of in config.emas.items():
        # One after the other: host memory, which all processes of a machine share, holds a single copy at a time.
        emas[name] = EMA(network, of)
        _place(emas[name].network, config, world, mesh)
    # Last, as a sharded network cannot be copied.
    _place(network, config, world, mesh)
    optimizer = build_optimizer(network.parameters(), config.optimizer)
    target = network if config.target_weights == CURRENT else emas[config.target_weights].network
    called: list[Any] = [network, target, teacher]
    if settings.compile and not sharded:
        # All are called with fixed batch shapes: no dynamic ones.
        compiled = {id(each): torch.compile(each, dynamic=False) for each in called if each is not None}
        called = [compiled.get(id(each)) for each in called]
    net, target_net, teacher_net = called
    if world.size > 1 and not sharded:
        net = replicate(net, world)
    parts = Parts(
        network, emas, optimizer, stream, teacher, net, target_net, teacher_net, teacher_finest_steps, info, flops
    )
    if last is not None:
        last.restore(tensors_of(parts), optimizer, network)
        stream.load_state_dict(last.state()["data"])
    return parts


def refresh_teacher(config: RunConfig, parts: Parts, position: Position, step: int) -> None:
    """Where the objective's next stage begins: the network that makes targets becomes the teacher."""
    if parts.teacher is None or step == 0:
        return
    before, now = (position.progress_at(at, config.training.steps) for at in (step - 1, step))
    if config.objective.teacher_stage(now) > config.objective.teacher_stage(before):
        copy_weights(parts.teacher, parts.weights(config.target_weights))


def _place(network: nn.Module, config: RunConfig, world: World, mesh: DeviceMesh | None) -> None:
    """Bring a network to the device; with a mesh this process's shards of it, unit by unit."""
    if mesh is None:
        network.to(world.device)
        return
    if config.training.compile:
        _compile_units(network, config.backbone.name)
    shard(network, mesh, bfloat16=config.training.precision == "bfloat16")


def _compile_units(network: Any, name: str) -> None:
    if not hasattr(network, "compile_blocks"):
        raise ValueError(
            f"backbone {name!r} cannot be compiled block by block, which sharding needs: "
            "use training.compile=false or training.parallel=ddp"
        )
    network.compile_blocks()


@contextmanager
def gradients(net: Network, *, added_up: bool) -> Iterator[None]:
    """Whether a backward pass in here adds the gradients up over all processes, or leaves it to a batch's last part."""
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(added_up)
    with nullcontext() if added_up or not hasattr(net, "no_sync") else net.no_sync():
        yield


def tensors_of(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """Every tensor that a checkpoint holds, by group and name; the very ones training works on."""
    groups = {NETWORK: parts.network.state_dict(), OPTIMIZER: optimizer_tensors(parts.optimizer, parts.network)}
    groups |= {ema_group(name): ema.network.state_dict() for name, ema in parts.emas.items()}
    if parts.teacher is not None:
        groups[TEACHER] = parts.teacher.state_dict()
    return groups


def norms_of(config: RunConfig, parts: Parts, world: World) -> UpdateNorms:
    """Watches the weights through the coming step."""
    settings = config.training
    over_shards = summed_over_shards(world, sharded=settings.parallel == "fsdp", shard_group=settings.shard_group)
    return UpdateNorms(parts.optimizer, over_shards)


def saver_for(config: RunConfig, checkpoints: Path, world: World) -> Saver:
    """Writes the run's checkpoints."""
    settings = config.training
    return Saver(
        checkpoints, first=world.is_first, group=world.cpu_group,
        keep=settings.keep_checkpoints, keep_every=settings.keep_checkpoint_every,
    )  # fmt: skip


def save(config: RunConfig, parts: Parts, saver: Saver, position: Position, step: int, skipped_steps: int) -> None:
    """Begin to write a checkpoint."""
    state = {
        "images_seen": position.images_at(step, config.training.global_batch_size),
        "skipped_steps": skipped_steps,
        "anchor": position.anchor,
        # What it was built with, which a network of the run need not be.
        "teacher_finest_steps": parts.teacher_finest_steps,
        "data": parts.stream.state_dict(),
        "config": config.model_dump(mode="json"),
        "versions": {"shortcutflow": __version__, "torch": torch.__version__},
    }
    saver.save(step, tensors_of(parts), state)


def save_snapshots(config: RunConfig, parts: Parts, run_dir: Path, step: int, *, first: bool) -> None:
    """Write those power-function EMAs whose time it is; every process must call it where they are sharded."""
    for name, settings in config.emas.items():
        if not isinstance(settings, PowerFunctionEMAConfig) or not settings.snapshot_every:
            continue
        # Also at the end: no EMA can be made for a step after the last snapshot.
        if step % settings.snapshot_every == 0 or step == config.training.steps:
            tensors = {}
            for key, tensor in parts.emas[name].network.state_dict().items():
                # One at a time, and only the process that writes keeps it, in the host's memory.
                together = whole(tensor)
                if first:
                    tensors[key] = together.cpu()
                del together
            if first:
                write_snapshot(run_dir, name, step, settings.sigma_rel, tensors)
