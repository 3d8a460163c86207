"""Kills processes while they save: ``python -m tests.train.saving FOLDER``, which gets a folder for each point."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from shortcutflow.io import atomic
from shortcutflow.train import checkpoint_writer
from shortcutflow.train.checkpoint_writer import CheckpointWriter

POINTS = ("nothing written", "tensors written", "state written", "tensors on disk", "all on disk", "named", "pruning")
"""When the process is killed, in the order of what happens."""


def filled(step: int) -> dict[str, dict[str, Tensor]]:
    """Two groups of tensors that tell the step they are of."""
    generator = torch.Generator().manual_seed(step)
    names = {"network": ("weight", "bias"), "optimizer": ("weight/exp_avg",)}
    return {group: {name: torch.randn(40, 30, generator=generator) for name in of} for group, of in names.items()}


def die(*args: object, **kwargs: object) -> Any:
    """SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function, whose last call is this many."""
    made = iter(range(1, 1000))

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return die() if next(made) == calls else result

    return counted


def patch_at(point: str) -> Any:
    """Makes this process die at the point."""
    match point:
        case "nothing written":
            return mock.patch.object(checkpoint_writer, "write_shards", die)
        case "tensors written":
            return mock.patch.object(checkpoint_writer, "write_shards", after(checkpoint_writer.write_shards, 1))
        case "state written":
            return mock.patch.object(atomic, "sync", die)
        case "tensors on disk":
            return mock.patch.object(atomic, "sync", after(atomic.sync, 1))
        case "all on disk":
            # Two files and their folder.
            return mock.patch.object(atomic, "sync", after(atomic.sync, 3))
        case "named":
            return mock.patch.object(Path, "replace", after(Path.replace, 1))
        case _:
            return mock.patch.object(shutil, "rmtree", die)


def save_and_die(folder: Path, point: str) -> None:
    """Step 1 is saved, step 2 is begun."""
    writer = CheckpointWriter(folder, keep=1)
    writer.save(1, filled(1), {})
    writer.wait()
    with patch_at(point):
        writer.save(2, filled(2), {})
        writer.wait()


def main(folder: Path) -> None:
    """A process for each point; complains of those that lived."""
    torch.set_num_threads(1)
    for point in POINTS:
        child = os.fork()
        if not child:
            try:
                save_and_die(folder / point, point)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{point}: {status}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
