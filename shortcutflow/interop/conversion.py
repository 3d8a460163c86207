"""A network of another code as one of this library's: what to build, and which of its parameters become which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shortcutflow.network import BackboneConfig

ReadTensor = Callable[[str], Tensor]
"""Returns a parameter of the source by its name."""
Shapes = Mapping[str, Sequence[int]]


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

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        """The parameter, contiguous, of the source's, one for each key."""
        return (torch.cat(list(tensors)) if self.transform is None else self.transform(*tensors)).contiguous()

    def read(self, read: ReadTensor) -> Tensor:
        """The parameter in float32 on the CPU.

        Raises:
            ValueError: for numbers that are not finite.
        """
        tensors = [read(key).float() for key in self.keys]
        for key, tensor in zip(self.keys, tensors, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(f"{key} holds numbers that are not finite")
        return self.make(tensors)

    def target_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.make([torch.empty(self.shape, device="meta") for _ in self.keys]).shape)


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

    def check(self, shapes: Shapes) -> None:
        """Raise ValueError unless exactly the parameters that are needed are there, each with its shape."""
        check_shapes(shapes, self.params, self.source, self.ignored)


def check_shapes(
    shapes: Shapes, params: Mapping[str, ParamSource], source: str, ignored: frozenset[str] = frozenset()
) -> None:
    """Raise ValueError unless exactly the sources of ``params`` and those ignored are there, each with its shape."""
    expected = {key: param.shape for param in params.values() for key in param.keys}
    missing = [key for key in expected if key not in shapes]
    unknown = [key for key in shapes if key not in expected and key not in ignored]
    if missing or unknown:
        found = [f"{what} {_listed(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise ValueError(f"it is no {source}: " + "; ".join(found))
    for key, shape in expected.items():
        if tuple(shapes[key]) != shape:
            raise ValueError(f"{key} has shape {tuple(shapes[key])}; the others make it {shape}")


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix in these names."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})[./]")
    return len({match[1] for name in names if (match := pattern.match(name))})


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more
