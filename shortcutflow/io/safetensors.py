"""Safetensors files: opening one, with an error that names it; and writing one tensor by tensor.

Written so, nothing is collected in memory, and other threads go on meanwhile: safetensors' own functions hold the
interpreter's lock from the first byte to the last, seconds for a large network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of the types."""


@contextmanager
def opened(path: Path, remedy: str, *, framework: Literal["pt", "np"] = "pt") -> Iterator[Any]:
    """A safetensors file to read from.

    Args:
        path: of the file.
        remedy: what to do about a damaged one, for the message.
        framework: whether tensors come as torch's or as NumPy's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error}): {remedy}") from error


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by name, and the words of its header; raises as :func:`opened` does."""
    with opened(path, remedy) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}


class TensorSpec(NamedTuple):
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    announced: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors in the order in which they come.

    Args:
        path: of the file.
        announced: shape and type of all tensors, by name.
        tensors: name and tensor on the CPU, in the order of ``announced``.
        metadata: words for the header.

    Raises:
        ValueError: if another tensor comes than was announced, or one of a type that the format does not know.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in announced.items():
        if tensor.dtype not in TYPES:
            raise ValueError(f"{path}: tensor {name!r} is {tensor.dtype}; a file can hold {', '.join(TYPES.values())}")
        start, end = end, end + tensor.bytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    due = iter(announced.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, numbers in tensors:
            if (name, TensorSpec(tuple(numbers.shape), numbers.dtype)) != next(due, None):
                raise ValueError(f"{path}: tensor {name!r} of shape {tuple(numbers.shape)} comes out of turn")
            # Its bytes where they are; writing them lets other threads run.
            file.write(numbers.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    if next(due, None) is not None:
        raise ValueError(f"{path}: fewer tensors came than the {len(announced)} announced")
