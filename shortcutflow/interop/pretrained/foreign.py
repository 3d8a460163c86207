"""A network of another code, described as one of this library's: what to build, and where each parameter comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shortcutflow.network import BackboneConfig

Make = Callable[..., Tensor]


def same(tensor: Tensor) -> Tensor:
    """The parameter as it is."""
    return tensor


class Entry(NamedTuple):
    """Where one of our parameters comes from.

    Attributes:
        theirs: names of the parameters it is made of, all of one shape.
        shape: which they must have.
        make: ours of theirs.
    """

    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    make: Make = same

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Ours, float32, on the CPU."""
        return self.make(*(tensors[name].float() for name in self.theirs)).contiguous()

    def our_shape(self) -> tuple[int, ...]:
        """Of our parameter."""
        return tuple(self.make(*(torch.empty(self.shape, device="meta") for _ in self.theirs)).shape)


@dataclass(frozen=True)
class Foreign:
    """A network of another code.

    Attributes:
        source: what it is, for a person.
        backbone: that gives the same outputs.
        shape: of a sample.
        num_classes: labels, beside the null label.
        entries: our parameters by name; those of the step size's embedding are not among them.
        unread: names of their parameters that no entry needs and that are no mistake.
        vae: the autoencoder of its latents.
        notes: what was assumed.
    """

    source: str
    backbone: BackboneConfig
    shape: tuple[int, ...]
    num_classes: int | None
    entries: Mapping[str, Entry]
    unread: frozenset[str] = frozenset()
    vae: str | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless exactly the parameters that are needed are there, each of its shape."""
        shapes = {name: entry.shape for entry in self.entries.values() for name in entry.theirs}
        missing = [name for name in shapes if name not in tensors]
        unexpected = [name for name in tensors if name not in shapes and name not in self.unread]
        if missing or unexpected:
            told = [
                f"{what} {_listed(names)}" for what, names in (("missing", missing), ("unknown", unexpected)) if names
            ]
            raise ValueError(f"it is no {self.source}: " + "; ".join(told))
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; the others make it {shape}")


def count_of(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix in these names: the blocks of a network."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more
