"""What PyTorch's distributed checkpoint writes with: safetensors that are written without holding up training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shortcutflow.io.safetensors import TensorSpec, write_tensors

PLACES = "DCP_SHARDING_INFO"
"""Where PyTorch's reader looks, in a file's header, for the place of each part in its tensor."""


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a process's part of all tensors into one file of a folder, in the format of the class it is made from.

    That class collects the file's bytes in memory and holds the interpreter's lock while it does, which stopped
    training for seconds.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder = folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the processes' files."""
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the file; gives what was written.

        Raises:
            ValueError: if this process holds two parts of one tensor, which a file has no room for.
        """
        parts: dict[str, Tensor] = {}
        for item in plan.items:
            name, data = item.index.fqn, planner.resolve_data(item)
            assert isinstance(data, Tensor)
            if name in parts:
                raise ValueError(f"one process holds two parts of {name!r}; shard it so that each holds one at most")
            parts[name] = data
        chunks: Any = {item.index.fqn: item.tensor_data for item in plan.items}
        places = {name: {"saved_offsets": list(chunk.chunk.offsets)} for name, chunk in chunks.items()}
        if parts:
            write_tensors(
                self._folder / f"shard-{plan.storage_data:05d}.safetensors",
                {name: TensorSpec(tuple(part.shape), part.dtype) for name, part in parts.items()},
                parts.items(),
                metadata={PLACES: json.dumps(places)},
            )
        written: Future[list[WriteResult]] = Future()
        sizes = {name: part.numel() * part.element_size() for name, part in parts.items()}
        written.set_result([WriteResult(item.index, sizes[item.index.fqn], None) for item in plan.items])
        return written
