"""A network of another code as one of this library's: what to build, and which of its parameters become which.

Transformers of other codes become the backbone "dit"; :func:`dit_params` says how.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shortcutflow.network import BackboneConfig, build_network

ReadTensor = Callable[[str], Tensor]
"""Returns a parameter of the source by its name."""
PAPER_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Hidden size to heads of the DiT paper's sizes."""
TIME_FEATURES = 256


class ParamSource(NamedTuple):
    """Where a parameter comes from.

    Attributes:
        keys: names of the source's parameters that it is made of, all of one shape.
        shape: which they must have.
        transform: makes the parameter of them, if it is not their concatenation.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    transform: Callable[..., Tensor] | None = None

    def read(self, read: ReadTensor) -> Tensor:
        """The parameter in float32 on the CPU; ValueError for numbers that are not finite."""
        tensors = [read(key).float() for key in self.keys]
        for key, tensor in zip(self.keys, tensors, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(f"{key} holds numbers that are not finite")
        return (torch.cat(tensors) if self.transform is None else self.transform(*tensors)).contiguous()


@dataclass(frozen=True)
class Conversion:
    """A network of another code.

    Attributes:
        source: what it is, for messages.
        backbone: the network with the same outputs.
        shape: of a sample.
        num_classes: labels, beside the null label.
        params: where each parameter comes from, by its name in the backbone; those of the step size's embedding may be
            missing.
        ignored: the source's parameters that nothing is made of.
        step_conditioned: whether the network was trained with step sizes.
        step: optimizer steps done, if known.
        vae: the autoencoder of its latents.
        notes: what was assumed.
        about: what else is worth saying, by topic.
    """

    source: str
    backbone: BackboneConfig
    shape: tuple[int, ...]
    num_classes: int | None
    params: Mapping[str, ParamSource]
    ignored: frozenset[str] = frozenset()
    step_conditioned: bool = False
    step: int | None = None
    vae: str | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    def check(self, shapes: Mapping[str, Sequence[int]], part: str = "") -> None:
        """Raise ValueError unless exactly the parameters that are needed are there, each with its shape.

        ``part`` says of which part of the source, at the beginning of the message.
        """
        expected = {key: param.shape for param in self.params.values() for key in param.keys}
        missing = [key for key in expected if key not in shapes]
        unknown = [key for key in shapes if key not in expected and key not in self.ignored]
        if missing or unknown:
            found = [f"{what} {_listed(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
            raise ValueError(f"{part}it is no {self.source}: " + "; ".join(found))
        for key, shape in expected.items():
            if tuple(shapes[key]) != shape:
                raise ValueError(f"{part}{key} has shape {tuple(shapes[key])}; the others make it {shape}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix in these names."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})[./]")
    return len({match[1] for name in names if (match := pattern.match(name))})


class DiTSizes(NamedTuple):
    """Of a transformer.

    Attributes:
        hidden_size, depth: of the tokens; number of blocks.
        mlp_size: units of a block's MLP.
        patch: its side.
        channels, out_channels: of a sample, and of the network's output, which may hold a variance too.
        num_classes: labels, without the null label.
    """

    hidden_size: int
    depth: int
    mlp_size: int
    patch: int
    channels: int
    out_channels: int
    num_classes: int


def dit_params(
    sizes: DiTSizes,
    layers: Mapping[str, str | tuple[str, ...]],
    label_table: str,
    *,
    weight: str = ".weight",
    bias: str = ".bias",
    transposed: bool = False,
) -> dict[str, ParamSource]:
    """Where each parameter of the backbone "dit" comes from.

    Args:
        sizes: of the transformer.
        layers: the backbone's name of a linear layer to the source's, or to those of several layers that make it up one
            below the other; ``{i}`` stands for the number of a block.
        label_table: name of the embedding of labels, the last of which is the null label.
        weight, bias: what the source's names of weights and biases end in.
        transposed: whether weights are (..., in, out) instead of (out, in, ...).
    """
    w, values = sizes.hidden_size, sizes.patch**2 * sizes.out_channels
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding": (w, sizes.channels, sizes.patch, sizes.patch),
        "condition.time.hidden": (w, TIME_FEATURES), "condition.time.out": (w, w),
        "condition.step.hidden": (w, TIME_FEATURES), "condition.step.out": (w, w),
        "head.modulation": (2 * w, w), "head.out": (values, w),
        "blocks.{i}.modulation": (6 * w, w),
        "blocks.{i}.mixer.qkv": (3 * w, w), "blocks.{i}.mixer.out": (w, w),
        "blocks.{i}.mlp.0": (sizes.mlp_size, w), "blocks.{i}.mlp.2": (w, sizes.mlp_size),
    }  # fmt: skip
    params = {"condition.label.weight": ParamSource((label_table,), (sizes.num_classes + 1, w))}
    for layer, sources in layers.items():
        names = (sources,) if isinstance(sources, str) else sources
        rows, *columns = shapes[layer]
        rows //= len(names)
        shape: tuple[int, ...] = (rows, *columns)
        of_weight: Callable[..., Tensor] | None = None
        of_bias: Callable[..., Tensor] | None = None
        if transposed:
            shape, of_weight = (*columns[1:], columns[0], rows), _transposed
        elif layer == "patch_embedding":
            of_weight = _patches_last
        elif layer == "head.out":
            of_weight = of_bias = partial(_without_variance, channels=sizes.channels, out_channels=sizes.out_channels)
        for i in range(sizes.depth if "{i}" in layer else 1):
            keys, target = [name.format(i=i) for name in names], layer.format(i=i)
            params[f"{target}.weight"] = ParamSource(tuple(f"{key}{weight}" for key in keys), shape, of_weight)
            params[f"{target}.bias"] = ParamSource(tuple(f"{key}{bias}" for key in keys), (rows,), of_bias)
    return params


def _transposed(*kernels: Tensor) -> Tensor:
    """Weights (out, in) of kernels (..., in, out), one below the other."""
    return torch.cat([kernel.flatten(0, -2).mT for kernel in kernels])


def _patches_last(weight: Tensor) -> Tensor:
    """A convolution's weights (w, c, p, q) as those of a linear layer on (p q c)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _without_variance(values: Tensor, *, channels: int, out_channels: int) -> Tensor:
    """Of rows (p q out_channels), those of the first ``channels``."""
    return values.unflatten(0, (-1, out_channels))[:, :channels].flatten(0, 1)


def dit_backbone(sizes: DiTSizes, heads: int, **options: Any) -> BackboneConfig:
    """The backbone "dit" of these sizes, with further options; ValueError if a size is below 1."""
    if min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1: {sizes}")
    of_sizes = {
        "width": sizes.hidden_size, "depth": sizes.depth, "heads": heads, "patch": sizes.patch,
        "mlp_ratio": sizes.mlp_size / sizes.hidden_size,
    }  # fmt: skip
    return BackboneConfig(name="dit", options=of_sizes | options)


def usual_heads(hidden_size: int) -> tuple[int, str]:
    """Heads by convention: the DiT paper's for its hidden sizes; else of 64 channels from 256 on, of 16 below.

    Returns:
        Their number, and a note that they were assumed.
    """
    size = 64 if hidden_size >= 256 else 16
    heads = PAPER_HEADS.get(hidden_size, hidden_size // size if hidden_size % size == 0 else 1)
    return heads, f"heads: {heads}, usual for hidden size {hidden_size}; the file does not say (--heads)"


def check_positions(found: Tensor, backbone: BackboneConfig, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError unless positions (1, n, hidden size) are the fixed ones that the network computes."""
    patch = backbone.options["patch"]
    if tuple(found.shape) != (1, math.prod(side // patch for side in shape[1:]), backbone.options["width"]):
        raise ValueError(f"{name} has shape {tuple(found.shape)}, which samples of shape {shape} do not have")
    # One block has the same positions as all of them.
    tiny = backbone.model_copy(update={"options": backbone.options | {"depth": 1}})
    network = build_network(tiny, shape=shape, num_classes=None, finest_steps=2, seed=0)
    found = found[0].float()
    off = (found - network.get_buffer("positions")).abs().max()
    # A file of float32 may hold numbers that were rounded to half precision before.
    rounded = (torch.bfloat16, torch.float16)
    precision = next((dtype for dtype in rounded if torch.equal(found, found.to(dtype).float())), torch.float32)
    if not off < 1e-4 + torch.finfo(precision).eps:
        raise ValueError(
            f"{name} is not the fixed sine-cosine table (off by {off:.3g}); a learned one is not supported"
        )
