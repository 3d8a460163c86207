"""A network on its device, and as several ranks hold it: sharded (FSDP2), or replicated (DDP)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.distributed import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weights autocast rounds to bfloat16 in any case."""


def mesh_of(world: World, shard_group: int | None) -> DeviceMesh:
    """The ranks as a mesh of replicas and shards; one for all networks, as each mesh makes communicators.

    Args:
        world: the ranks.
        shard_group: ranks that hold one copy together; None: all.

    Raises:
        ValueError: if shard_group does not divide the world size.
    """
    from torch.distributed.device_mesh import init_device_mesh

    group = shard_group or world.size
    if world.size % group:
        raise ValueError(f"training.shard_group is {group}: it must divide the {world.size} processes")
    if group == world.size:
        mesh = init_device_mesh(world.device.type, (group,))
    else:
        mesh = init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=("replicas", "shards"))
    world.groups.extend(mesh.get_all_groups())
    return mesh


def place(network: nn.Module, config: RunConfig, world: World, mesh: DeviceMesh | None) -> None:
    """Move a network to the device; with a mesh this rank's shards of it, unit by unit, compiled if the run is.

    Raises:
        ValueError: if it is to be compiled and sharded, and cannot be compiled block by block.
    """
    if mesh is None:
        network.to(world.device)
        return
    if config.training.compile:
        compile_blocks: Any = getattr(network, "compile_blocks", None)
        if compile_blocks is None:
            raise ValueError(
                f"backbone {config.backbone.name!r} cannot be compiled block by block, which sharding needs: "
                "use training.compile=false or training.parallel=ddp"
            )
        compile_blocks(**compile_options(world.device))
    shard(network, mesh, bfloat16=config.training.precision == "bfloat16")


def compile_options(device: torch.device) -> dict[str, Any]:
    """Arguments of ``torch.compile`` for a device."""
    # Where a CPU's convolutions are moved to channels-last, torch 2.13 gives wrong gradients for the U-Nets of
    # diffusers, outside of this library too: zero below their upsampling.
    return {"options": {"layout_optimization": False}} if device.type == "cpu" else {}


def shard(network: nn.Module, mesh: DeviceMesh, *, bfloat16: bool) -> None:
    """Shard a network in place with FSDP2: each unit of its ``shard_plan`` by itself, the rest together.

    Units travel in bfloat16 if all their weights belong to layers that autocast would round anyway, so the numbers are
    those of an unsharded run. FSDP2 moves each unit to the mesh's device as it is called for it, and keeps the shard.

    Args:
        network: in host memory, so that the device never holds all of it; not compiled yet, or block by block.
        mesh: from :func:`mesh_of`.
        bfloat16: whether training runs under autocast.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    units: list[nn.Module] = network.shard_plan() if hasattr(network, "shard_plan") else []  # type: ignore[operator]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=rounded if bfloat16 and _rounded_by_autocast(unit) else exact)
    # An EMA is called without a backward pass: were its outermost weights kept after a call, the next one would
    # not see that they have been updated.
    fully_shard(network, mesh=mesh, mp_policy=exact, reshard_after_forward=True)


class RoundedCopy:
    """A network that makes targets, its weights kept in bfloat16 where autocast would round them anew in each call.

    Its numbers under autocast are those of the network itself. It costs 2 bytes a weight of the same units that FSDP2
    moves in bfloat16; everything else, and every buffer, is the network's own.

    Args:
        original: the network, whole and on its device.

    Attributes:
        network: the copy, without gradient; as the original was when :meth:`refresh` was last called.
    """

    def __init__(self, original: nn.Module) -> None:
        self._exact: list[Tensor] = rounded_weights(original)
        self._rounded: list[Tensor] = [
            nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False) for p in self._exact
        ]
        # What a deep copy finds here it takes as it is.
        known: dict[int, Tensor] = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
        known |= {id(exact): rounded for exact, rounded in zip(self._exact, self._rounded, strict=True)}
        self.network = copy.deepcopy(original, known)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the original's weights as they are now."""
        if self._exact:
            torch._foreach_copy_(self._rounded, self._exact)


def rounded_weights(network: nn.Module) -> list[Tensor]:
    """The weights that autocast rounds in each call: of the units that FSDP2 moves in bfloat16."""
    units: list[nn.Module] = network.shard_plan() if hasattr(network, "shard_plan") else []  # type: ignore[operator]
    return [p for unit in units if _rounded_by_autocast(unit) for p in unit.parameters()]


def _rounded_by_autocast(unit: nn.Module) -> bool:
    owners = (module for module in unit.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(isinstance(module, AUTOCAST_LAYERS) for module in owners)


def sum_over_shards(world: World, settings: TrainingConfig) -> Callable[[Tensor], Tensor]:
    """Turns sums over this rank's weights into sums over all weights, each counted once."""
    if settings.parallel != "fsdp":
        return lambda values: values
    copies = world.size // (settings.shard_group or world.size)
    return lambda values: world.sum(values) / copies


def replicate(network: nn.Module, world: World) -> nn.Module:
    """The network in DistributedDataParallel, which sums the gradients of all ranks during the backward pass."""
    from torch.nn.parallel import DistributedDataParallel

    ids = [world.device.index] if world.device.type == "cuda" else None
    # Newer versions have another name for broadcast_buffers, which older ones do not know.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
