"""Files and folders that appear when they are complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A place to write a file or a folder of ``out``'s name; it gets there if nothing is raised.

    Files beside it, such as a file's own companions, go with it, and before it.

    Raises:
        FileExistsError: if something of that name, or of a companion's, is there.
        FileNotFoundError: if the folder that it shall be in is not.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    _check_free(out)
    room = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    room.mkdir()
    try:
        yield room / out.name
        ready = sorted(room.iterdir(), key=lambda path: path.name == out.name)
        for path in ready:
            _check_free(out.with_name(path.name))
        for path in ready:
            path.replace(out.with_name(path.name))
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already: give another name")


def check_may_appear(out: Path) -> None:
    """Raise FileExistsError if this folder holds something, or is none."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: give a folder that does not, or an empty one")


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that gets its name when all went well, and else vanishes."""
    out = out.absolute()
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    new = [parent for parent in out.parents if not parent.exists()]
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.replace(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in new:
            parent.rmdir()
        raise
