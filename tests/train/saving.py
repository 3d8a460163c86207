"""What ends in the middle of saving: processes that are killed, and files that the system lets grow no further."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from shortcutflow.io import atomic
from shortcutflow.train import checkpoint_writer
from shortcutflow.train.checkpoint_writer import CheckpointWriter, SavingError

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


def kill_at_each_point(folder: Path) -> None:
    """A process and a folder in this one for each point; complains of those that lived."""
    for point in POINTS:
        child = os.fork()
        if not child:
            try:
                save_and_die(folder / point, point)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{point}: {status}"


def save_too_much(folder: Path) -> None:
    """Step 1 is saved; then no file may grow beyond 100 kB, as step 2 would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with CheckpointWriter(folder) as writer:
        writer.save(1, {"network": {"a": torch.ones(1000)}}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    writer = CheckpointWriter(folder)
    writer.save(2, {"network": {"a": torch.ones(1_000_000)}}, {})
    try:
        writer.wait()
    except SavingError as error:
        print(error)
