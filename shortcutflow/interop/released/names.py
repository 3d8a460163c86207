"""The released code's parameters by their flax names, and the parameters of the backbone "dit" with ``released=True``.

Names and layouts: dense kernels are (in, out); a block's Dense_1, Dense_2 and Dense_3 are key, query and value; the
patch convolution's kernel is (row, column, in, out); the final channels of a patch are ordered (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np

PATCHES = "PatchEmbed_0/Conv_0"
LABELS = "LabelEmbedder_0/Embed_0/embedding"
QUERY, KEY, VALUE = "Dense_2", "Dense_1", "Dense_3"

_LINEAR = {
    "TimestepEmbedder_0/Dense_0": "condition.time.hidden",
    "TimestepEmbedder_0/Dense_1": "condition.time.out",
    "TimestepEmbedder_1/Dense_0": "condition.step.hidden",
    "TimestepEmbedder_1/Dense_1": "condition.step.out",
    "FinalLayer_0/Dense_0": "head.modulation",
    "FinalLayer_0/Dense_1": "head.out",
    PATCHES: "patch_embedding",
}
_BLOCK_LINEAR = {
    "Dense_0": "modulation",
    "Dense_4": "mixer.out",
    "MlpBlock_0/Dense_0": "mlp.0",
    "MlpBlock_0/Dense_1": "mlp.2",
}
_TABLE = {LABELS: "condition.label.weight", "Embed_0/embedding": "log_variances"}


class Entry(NamedTuple):
    """One parameter of ours and those of theirs that it is made of.

    Attributes:
        ours: name in the state dict.
        theirs: flax names; several are stacked along the outputs.
        kind: "kernel" is transposed, "bias" and "table" are as they are.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["kernel", "bias", "table"]


def entries(depth: int) -> list[Entry]:
    """Every parameter of a network with so many blocks."""
    layers: list[tuple[str, tuple[str, ...]]] = [(ours, (theirs,)) for theirs, ours in _LINEAR.items()]
    for i in range(depth):
        block = f"DiTBlock_{i}"
        layers += [(f"blocks.{i}.{ours}", (f"{block}/{theirs}",)) for theirs, ours in _BLOCK_LINEAR.items()]
        layers += [(f"blocks.{i}.mixer.qkv", tuple(f"{block}/{part}" for part in (QUERY, KEY, VALUE)))]
    found = [Entry(ours, (theirs,), "table") for theirs, ours in _TABLE.items()]
    for ours, theirs in layers:
        found.append(Entry(f"{ours}.weight", tuple(f"{name}/kernel" for name in theirs), "kernel"))
        found.append(Entry(f"{ours}.bias", tuple(f"{name}/bias" for name in theirs), "bias"))
    return found


def depth_of(names: Iterable[str], *, prefix: str = "DiTBlock_") -> int:
    """How many blocks there are parameters of; ``prefix="blocks."`` for our names."""
    separator = prefix[-1] if prefix.endswith(".") else "/"
    rest = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({name.split(separator)[0] for name in rest})


def to_ours(entry: Entry, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """One parameter of ours, contiguous float32, from theirs read by name."""
    parts = [np.asarray(read(name), dtype=np.float32) for name in entry.theirs]
    if entry.kind == "kernel":
        parts = [part.reshape(-1, part.shape[-1]).T for part in parts]
    return np.ascontiguousarray(np.concatenate(parts))


def to_theirs(entry: Entry, array: np.ndarray, *, patch: int) -> dict[str, np.ndarray]:
    """Their parameters, contiguous float32, from one of ours."""
    found = {}
    for name, part in zip(entry.theirs, np.split(array.astype(np.float32), len(entry.theirs)), strict=True):
        if entry.kind == "kernel":
            part = part.T
            if name.startswith(PATCHES):
                part = part.reshape(patch, patch, -1, part.shape[-1])
        found[name] = np.ascontiguousarray(part)
    return found


def check_names(there: Iterable[str], wanted: set[str]) -> None:
    """Raise ValueError naming what is missing or unknown, the first few."""
    there = set(there)
    for what, names in (("lacks", wanted - there), ("has unknown", there - wanted)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"it {what} parameters: {', '.join(sorted(names)[:3])}{more}")
