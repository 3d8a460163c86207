"""What training changes: built, placed on the device, restored from a checkpoint and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shortcutflow import __version__
from shortcutflow.checkpoint import NETWORK, OPTIMIZER, TEACHER, Checkpoint, ema_group, optimizer_tensors
from shortcutflow.config import CURRENT, RunConfig, check_rows
from shortcutflow.data.coupled import CoupledStream
from shortcutflow.data.source import DataInfo
from shortcutflow.data.stream import BatchStream
from shortcutflow.distributed import World
from shortcutflow.dtensor import full_tensor
from shortcutflow.ema import EMA, PowerFunctionEMAConfig
from shortcutflow.objectives import Objective
from shortcutflow.optim import build_optimizer
from shortcutflow.posthoc import write_snapshot
from shortcutflow.train.checkpoint_writer import CheckpointWriter
from shortcutflow.train.init_from import load_start, open_teacher
from shortcutflow.train.metrics import forward_flops
from shortcutflow.train.parallel import RoundedCopy, compile_options, mesh_of, place, replicate, rounded_weights
from shortcutflow.train.resume import Position
from shortcutflow.types import Network


class TrainState(NamedTuple):
    """Networks, optimizer and data position: everything that a checkpoint has to hold.

    Attributes:
        network, emas: as they are saved; sharded if the run is.
        optimizer: of the network.
        stream: this rank's slice of the data.
        teacher: the network that the objective learns from, as it is saved; None without one.
        net, target_net, teacher_net: the networks as an objective calls them: compiled, in DistributedDataParallel, or
            as they are.
        objective: of the run, compiled with the networks that it calls, or as it is.
        rounded_target: what target_net is a call of, if not of the network or an EMA itself.
        teacher_finest_steps: M of the network that the teacher is built as; None without one.
        info: shape and conditions of the data, which lie in a file, perhaps a remote one: read once.
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
    objective: Objective
    rounded_target: RoundedCopy | None
    teacher_finest_steps: int | None
    info: DataInfo
    forward_flops: int | None

    def weights(self, name: str) -> nn.Module:
        """The network of an EMA, or the one that is trained."""
        return self.network if name == CURRENT else self.emas[name].network

    def update_emas(self, step: int) -> None:
        """Average the weights of optimizer step ``step``, counted from 0, into each EMA; new weights make targets."""
        for ema in self.emas.values():
            ema.update(self.network, step)
        if self.rounded_target is not None:
            self.rounded_target.refresh()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that a checkpoint holds, by group and name; the very ones that training changes."""
        groups = {NETWORK: self.network.state_dict(), OPTIMIZER: optimizer_tensors(self.optimizer, self.network)}
        groups |= {ema_group(name): ema.network.state_dict() for name, ema in self.emas.items()}
        if self.teacher is not None:
            groups[TEACHER] = self.teacher.state_dict()
        return groups


def build_train_state(config: RunConfig, world: World, last: Checkpoint | None = None) -> TrainState:
    """Network, EMAs, optimizer and data stream: equal weights on every rank, or their shards.

    Without a checkpoint they are those of step 0. With one they are filled from it, so that the folders of the start
    and the teacher are not needed any more.

    All networks are made in host memory and then go to the device, so that their first weights are the same on any
    device and in any mode. Sharded, a device holds its shards and never more than one whole unit besides.

    Raises:
        ValueError: for settings that do not fit together, or a checkpoint of another run.
    """
    settings = config.training
    if settings.global_batch_size % (world.size * settings.accumulation):
        raise ValueError(
            f"a global batch of {settings.global_batch_size} cannot be shared equally by {world.size} processes that "
            f"take their shares in {settings.accumulation} parts"
        )
    check_rows(config.objective, settings.global_batch_size, world.size * settings.accumulation)
    stream = open_stream(config, world)
    network: Any = config.build_network()
    if settings.gradient_checkpointing:
        if not hasattr(network, "gradient_checkpointing"):
            raise ValueError(f"backbone {config.backbone.name!r} has no gradient checkpointing")
        network.gradient_checkpointing = True
    info = config.data.describe()
    config.check_conditions(info)
    flops = forward_flops(network, info.num_classes)
    teacher: nn.Module | None = None
    teacher_finest_steps = None
    if last is None:
        opened = open_teacher(config)
        load_start(config, network, opened)
        if opened is not None:
            teacher, teacher_finest_steps = opened.network, opened.finest_steps
    elif config.teacher is not None:
        teacher_finest_steps = last.state().get("teacher_finest_steps", config.finest_steps)
        teacher = config.build_network(finest_steps=teacher_finest_steps, wrapped=False).eval().requires_grad_(False)
    sharded = settings.parallel == "fsdp"
    mesh = mesh_of(world, settings.shard_group) if sharded else None
    if teacher is not None:
        place(teacher, config, world, mesh)
    emas = {}
    for name, ema_config in config.emas.items():
        # One after the other: host memory, which all ranks of a machine share, holds a single copy at a time.
        emas[name] = EMA(network, ema_config)
        place(emas[name].network, config, world, mesh)
    # Last, as a sharded network cannot be copied.
    place(network, config, world, mesh)
    optimizer = build_optimizer(network.parameters(), config.optimizer)
    target = network if config.target_weights == CURRENT else emas[config.target_weights].network
    rounded_target = rounded_target_of(config, target)
    objective, (net, target_net, teacher_net) = as_called(
        config, world, [network, target if rounded_target is None else rounded_target.network, teacher]
    )
    if world.size > 1 and not sharded:
        net = replicate(net, world)
    state = TrainState(
        network, emas, optimizer, stream, teacher, net, target_net, teacher_net, objective, rounded_target,
        teacher_finest_steps, info, flops,
    )  # fmt: skip
    if last is not None:
        last.restore(state.tensors(), optimizer, network)
        if rounded_target is not None:
            rounded_target.refresh()
        stream.load_state_dict(last.state()["data"])
    return state


def as_called(config: RunConfig, world: World, networks: list[nn.Module | None]) -> tuple[Objective, list[Any]]:
    """The objective and the networks that it calls, compiled if the run is; sharded ones are, block by block."""
    if not config.training.compile or config.training.parallel == "fsdp":
        return config.objective, list(networks)
    options = {"dynamic": False if config.objective.has_fixed_shapes else None, **compile_options(world.device)}
    compiled = {id(each): torch.compile(each, **options) for each in networks if each is not None}
    return config.objective.compiled(regress=world.size == 1, **options), [compiled.get(id(each)) for each in networks]


def rounded_target_of(config: RunConfig, target: nn.Module) -> RoundedCopy | None:
    """The copy of a network on its device that makes targets under autocast; FSDP2 rounds what it gathers itself."""
    settings = config.training
    if settings.precision != "bfloat16" or settings.parallel == "fsdp" or not rounded_weights(target):
        return None
    return RoundedCopy(target) if config.objective.target_evaluations(settings.global_batch_size) else None


def open_stream(config: RunConfig, world: World) -> BatchStream:
    """This rank's batches, with their noise if the run has a coupling."""
    options: dict[str, Any] = {
        "batch_size": config.training.global_batch_size, "seed": config.seed,
        "rank": world.rank, "world_size": world.size, "device": world.device,
    }  # fmt: skip
    if config.coupling is None:
        return config.data.open_stream(**options)
    return CoupledStream(config.data, config.coupling, **options)


def save(
    config: RunConfig, state: TrainState, writer: CheckpointWriter, position: Position, step: int, skipped_steps: int
) -> None:
    """Begin to write a checkpoint."""
    values = {
        "images_seen": position.images_at(step, config.training.global_batch_size),
        "skipped_steps": skipped_steps,
        "anchor": position.anchor,
        # M of the teacher as it was built, which may differ from the run's.
        "teacher_finest_steps": state.teacher_finest_steps,
        "data": state.stream.state_dict(),
        "config": config.model_dump(mode="json"),
        "versions": {"shortcutflow": __version__, "torch": torch.__version__},
    }
    writer.save(step, state.tensors(), values)


def save_snapshots(
    config: RunConfig, state: TrainState, writer: CheckpointWriter, run_dir: Path, step: int, *, is_main: bool
) -> None:
    """Begin to write the power-function EMAs that are due; every rank must call it where they are sharded."""
    for name, ema_config in config.emas.items():
        if not isinstance(ema_config, PowerFunctionEMAConfig) or not ema_config.snapshot_every:
            continue
        # Also at the end: no EMA can be made for a step after the last snapshot.
        if step % ema_config.snapshot_every == 0 or step == config.training.steps:
            tensors = {}
            for key, tensor in state.emas[name].network.state_dict().items():
                # Gathered one at a time; only the rank that writes keeps it, in host memory, while training goes on.
                gathered = full_tensor(tensor)
                if is_main:
                    tensors[key] = gathered.to("cpu", copy=True)
                del gathered
            if is_main:
                writer.in_background(write_snapshot, run_dir, name, step, ema_config.sigma_rel, tensors)
