"""Processes that tests start: forked from one that has loaded everything, or a command with an interpreter of its own.

To load PyTorch and the trainer takes a process six seconds, and to do what a test asks of it a tenth of one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
PATIENCE = 300
"""Seconds that a test waits for its processes on a machine with better things to do."""
LOADED = (
    "tests.train.launched", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict", "torch.utils.tensorboard", "tests.evaluation.evaluating",
    "tests.backbones_contract.cases",
)  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(LOADED))


def environment() -> dict[str, str]:
    """Of a process that shares the machine."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(command: Sequence[str], patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run it to its end, or end it: a launcher that gets SIGTERM ends its workers too."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=err, text=True)
        try:
            process.wait(patience)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


@dataclass(frozen=True)
class Ended:
    """How forked processes ended.

    Attributes:
        returncode: of a single process; of a group 0, or 1 if one of it failed.
        stdout, stderr: of all of them.
    """

    returncode: int
    stdout: str
    stderr: str


@contextmanager
def forked(
    function: Callable[..., Any], *arguments: Any, processes: int | None = None, output: Path | None = None
) -> Iterator[list[ForkServerProcess]]:
    """Processes that call an importable function; those that are left at the end are killed.

    Args:
        function, arguments: what each of them calls.
        processes: a group of so many, with the variables and the store that ``torchrun`` gives to its workers; None for
            a single one without them.
        output: a folder for the files ``stdout`` and ``stderr``.
    """
    shared = environment()
    store = None
    if processes:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
    started = []
    try:
        for rank in range(processes or 1):
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}
            process = SERVER.Process(target=_call, args=(shared | ranked, output, function, arguments))
            process.start()
            started.append(process)
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def run_forked(
    function: Callable[..., Any], *arguments: Any, processes: int | None = None, patience: float = PATIENCE
) -> Ended:
    """Let such processes come to their end. Where one of a group fails the others are ended, as ``torchrun`` does."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        with forked(function, *arguments, processes=processes, output=output) as group:
            until = time.monotonic() + patience
            left = list(group)
            while left and not any(process.exitcode for process in group):
                if not connection.wait([process.sentinel for process in left], until - time.monotonic()):
                    raise TimeoutError(f"runs after {patience} s: {(output / 'stderr').read_text()[-4000:]}")
                left = [process for process in left if process.exitcode is None]
            for process in left:
                process.terminate()
                process.join(10)
            codes = [process.exitcode for process in group]
        returncode = int(any(codes)) if processes else codes[0]
        assert returncode is not None
        return Ended(returncode, (output / "stdout").read_text(), (output / "stderr").read_text())


def script(folder: Path, file: Path, *argv: str) -> None:
    """What ``python FILE ...`` does in a folder: for :func:`run_forked`."""
    os.chdir(folder)
    sys.argv = [str(file), *argv]
    runpy.run_path(str(file), run_name="__main__")


def _call(
    variables: dict[str, str], output: Path | None, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for stream, name in enumerate(("stdout", "stderr"), start=1):
        with (output / name if output else Path(os.devnull)).open("ab") as file:
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    function(*arguments)
