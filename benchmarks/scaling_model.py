"""What a training step costs on many GPUs, on paper: operations, the collectives it makes, and assumed speeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

import backbones
from shortcutflow.train.parallel import AUTOCAST_LAYERS

BOOTSTRAP = 0.25
"""Share of bootstrap rows; each takes two evaluations more, by the target network."""
TARGET_CALLS = 2
BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends at once."""
SHARDS = 8
"""Of the hybrid plan: as many as a machine has GPUs."""
PASSES = 11
"""Reads and writes of 4 bytes a parameter by AdamW (7), the average (3) and the gradient's norm (1)."""
NETWORKS = {"InfiniBand": 0.8 * 8 * 50e9, "Ethernet": 0.8 * 12.5e9}
"""Bytes a second into a machine: eight adapters of 400 Gbit/s, or one of 100 Gbit/s, at 80 %."""
Plan = Literal["ddp", "fsdp", "hybrid"]
PLANS: tuple[Plan, ...] = ("ddp", "fsdp", "hybrid")


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machines: eight H100 each. The first four lines are data sheets times a guess.

    Attributes:
        peak: dense bfloat16 FLOP/s of a GPU.
        utilisation: share of it that a network reaches, at every batch size.
        memory: bytes a second that a GPU reads or writes: 3.35 TB/s, at 80 %.
        inside: bytes a second that a GPU sends to others of its machine: NVLink's 450 GB/s, at 80 %.
        between: bytes a second that a whole machine sends to others.
        hop_inside, hop_between: seconds until the first byte arrives.
        fixed: seconds of a step that no GPU takes away: launches, the finite check, the loop.
        exposed: share of the communication that is never hidden: the first gather, the last gradient.
        gpus: in a machine.
    """

    peak: float = 989e12
    utilisation: float = 0.4
    memory: float = 0.8 * 3.35e12
    inside: float = 0.8 * 450e9
    between: float = NETWORKS["InfiniBand"]
    hop_inside: float = 2e-6
    hop_between: float = 6e-6
    fixed: float = 5e-3
    exposed: float = 0.1
    gpus: int = 8


class Model(NamedTuple):
    """What is known of a network.

    Attributes:
        flops: of a forward pass of one sample.
        units: shards that travel in bfloat16, one after the other,
        rounded: with so many parameters together;
        exact: parameters that travel together in float32.
        seconds: of one evaluation of one sample, if measured.
    """

    name: str
    flops: float
    units: int
    rounded: int
    exact: int
    seconds: float | None = None

    @property
    def parameters(self) -> int:
        return self.rounded + self.exact


class Collective(NamedTuple):
    """One exchange: its kind, the bytes of the whole tensor, the processes, and how many of them share a machine."""

    kind: Literal["gather", "scatter", "reduce"]
    bytes: float
    size: int
    per_machine: int

    @property
    def moved(self) -> float:
        """Bytes that each process sends: (w - 1)/w of the tensor, twice for an all-reduce."""
        return (2 if self.kind == "reduce" else 1) * (self.size - 1) / self.size * self.bytes

    def seconds(self, machine: Machine) -> float:
        """Bytes over the slowest link, plus hops: along a ring; for an all-reduce up and down a tree.

        Processes of one machine share its way out, be they in one group or in several at once.
        """
        if self.size == 1:
            return 0.0
        machines = math.ceil(self.size / self.per_machine)
        speed = machine.inside
        if machines > 1:
            speed = min(speed, machine.between * self.per_machine / machine.gpus)
        if self.kind == "reduce":
            inside, between = 2 * math.log2(min(self.size, self.per_machine)), 2 * math.log2(machines)
        else:
            inside, between = self.size - machines, machines - 1
        return self.moved / speed + inside * machine.hop_inside + between * machine.hop_between


class Step(NamedTuple):
    """Seconds of a step and its parts, and the bytes each GPU sends in it."""

    seconds: float
    compute: float
    optimizer: float
    communication: float
    moved: float


def described(name: str, **options: Any) -> Model:
    """A backbone for 32x32x4 latents of 1,000 classes, with its options."""
    with torch.device("meta"):
        net: Any = backbones.create(name, shape=(4, 32, 32), num_classes=1000, **options)
    units = [unit for unit in net.shard_plan() if _travels_rounded(unit)]
    rounded = sum(p.numel() for unit in units for p in unit.parameters())
    y = torch.zeros(1, dtype=torch.int64)
    return Model(name, net.flops(y=y), len(units), rounded, sum(p.numel() for p in net.parameters()) - rounded)


def _travels_rounded(unit: torch.nn.Module) -> bool:
    return all(isinstance(m, AUTOCAST_LAYERS) for m in unit.modules() if list(m.parameters(recurse=False)))


def collectives(model: Model, plan: Plan, gpus: int, machine: Machine) -> list[Collective]:
    """What a step sends. FSDP gathers for the targets' calls, the forward and the backward pass."""
    if plan == "ddp":
        count = math.ceil(4 * model.parameters / BUCKET)
        return [Collective("reduce", 4 * model.parameters / count, gpus, machine.gpus)] * count
    size = min(gpus, SHARDS) if plan == "hybrid" else gpus
    unit = model.rounded / model.units
    once = [Collective("gather", 4 * model.exact, size, machine.gpus)]
    once += [Collective("gather", 2 * unit, size, machine.gpus)] * model.units
    back = [Collective("scatter", 4 * unit, size, machine.gpus)] * model.units
    back.append(Collective("scatter", 4 * model.exact, size, machine.gpus))
    # A gradient's shard then meets those of the other copies; each machine has one process of each of these groups.
    across = [Collective("reduce", each.bytes / size, gpus // size, 1) for each in back] if gpus > size else []
    return once * (TARGET_CALLS + 2) + back + across


def predicted(model: Model, plan: Plan, gpus: int, global_batch: int, machine: Machine) -> Step:
    """A step of the slowest rank."""
    rows = math.ceil(global_batch / gpus)
    evaluations = 3 * rows + TARGET_CALLS * math.ceil(global_batch * BOOTSTRAP / gpus)
    seconds = model.seconds or model.flops / (machine.peak * machine.utilisation)
    compute = seconds * evaluations
    shards = {"ddp": 1, "fsdp": gpus, "hybrid": min(gpus, SHARDS)}[plan]
    optimizer = 4 * PASSES * model.parameters / shards / machine.memory
    sent = collectives(model, plan, gpus, machine)
    communication = sum(each.seconds(machine) for each in sent)
    # DDP has only the backward pass to hide behind, two of an evaluation's three.
    hiding = compute * (2 * rows / evaluations if plan == "ddp" else 1)
    shown = max(machine.exposed * communication, communication - hiding)
    # The gradient's norm and the finite check; nothing goes on beside them.
    shown += 2 * Collective("reduce", 8, gpus, machine.gpus).seconds(machine)
    total = machine.fixed + compute + optimizer + shown
    return Step(total, compute, optimizer, communication, sum(each.moved for each in sent))
