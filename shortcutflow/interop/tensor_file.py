"""Writing a safetensors file tensor by tensor, for weights that need not fit into memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write float32 tensors, in the order in which they come.

    Args:
        path: of the file.
        shapes: of all tensors, by name.
        arrays: name and numbers, in the order of ``shapes``.
        metadata: words for the header.

    Raises:
        ValueError: if another array comes than was announced.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    announced = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays:
            if (name, array.shape) != next(announced, None):
                raise ValueError(f"{path}: tensor {name!r} of shape {array.shape} comes out of turn")
            np.ascontiguousarray(array, dtype="<f4").tofile(file)
    if next(announced, None) is not None:
        raise ValueError(f"{path}: fewer tensors came than the {len(shapes)} announced")
