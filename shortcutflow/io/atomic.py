"""Files and folders that are complete on the disk or not there.

Everything is written beside its place, forced onto the disk and then renamed. The hidden name it has until then,
``.NAME.unfinished-HOST-PID-RANDOM``, is unique also among machines that share a disk. Nothing that this library did not
write is replaced or removed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HOST = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64] or "host"
_UNFINISHED = re.compile(r"\..+\.unfinished-([A-Za-z0-9._]+)-(\d+)-[0-9a-f]{8}")
_SEARCHED = 2**16


def unfinished_name(path: Path) -> Path:
    """The hidden name beside ``path`` under which it is written, different at each call."""
    name = path.name.encode()[:120].decode(errors="ignore")  # a file system takes 255 bytes
    return path.with_name(f".{name}.unfinished-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Force a file, or which files a folder holds, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Force a file, or a folder and everything in it, onto the disk."""
    for inside in path.iterdir() if path.is_dir() else ():
        sync_tree(inside)
    sync(path)


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The name to write a file under; it replaces ``path`` if nothing is raised, and is removed otherwise.

    ``durable`` forces it onto the disk before, so that it also survives a loss of power.
    """
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        if durable:
            sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file, complete or not at all. Characters that UTF-8 lacks are written as escapes."""
    with atomic_file(path, durable=durable) as unfinished:
        unfinished.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def atomic_output(out: Path) -> Iterator[Path]:
    """A place to write a new file or folder of ``out``'s name, which gets there if nothing is raised.

    Files beside it, such as a file's companions, go with it, and before it.

    Raises:
        FileExistsError: if something of one of these names is there, except an empty folder.
        FileNotFoundError: if the folder that it is to be in does not exist.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    require_absent(out)
    room = unfinished_name(out)
    room.mkdir()
    try:
        yield room / out.name
        sync_tree(room)
        ready = sorted(room.iterdir(), key=lambda path: path.name == out.name)
        for path in ready:
            require_absent(out.with_name(path.name))
        for path in ready:
            try:
                path.replace(out.with_name(path.name))
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise FileExistsError(f"{out} was made by another process meanwhile") from error
                raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def atomic_dir(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` if nothing is raised; folders above it are made too.

    Raises:
        FileExistsError: if ``out`` holds something or is a file.
    """
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.absolute().parent)
    try:
        with atomic_output(out) as folder:
            folder.mkdir()
            yield folder
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # another process needs it
                parent.rmdir()
        raise


def build_once(folder: Path, write: Callable[[Path], object], *, marker: str) -> Path:
    """The folder, filled by ``write`` unless it is complete, that is, has a file called ``marker``.

    Several processes may call at once: the first to finish counts.

    Raises:
        FileExistsError: if the folder holds something else.
    """
    if (folder / marker).is_file():
        return folder
    try:
        with atomic_dir(folder) as unfinished:
            write(unfinished)
    except FileExistsError:
        if not (folder / marker).is_file():
            raise
    return folder


def claim(folder: Path) -> None:
    """Make a folder to write files into one by one, which later calls recognise by a hidden marker in it.

    Raises:
        FileExistsError: if it holds files and no such marker.
    """
    marker = folder / ".shortcutflow"
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        try:
            require_absent(folder)
        except FileExistsError:
            if not marker.exists():  # another process may just have made it
                raise
        marker.touch()


def require_absent(path: Path) -> None:
    """Refuse a name that is taken by anything but an empty folder.

    Raises:
        FileExistsError: naming some of what a folder holds.
    """
    if path.is_dir() and (held := sorted(inside.name for inside in path.iterdir())):
        names = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise FileExistsError(f"{path} exists already, and holds {names}: name a folder that is new or empty")
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        raise FileExistsError(f"{path} exists already: give another name")


def require_ours(path: Path, mark: bytes = b"shortcutflow") -> None:
    """Refuse to replace a file that this library did not write.

    Args:
        path: of the file; there may be none.
        mark: what files of this library hold near their beginning or end.

    Raises:
        FileExistsError: if a file without the mark, or a folder, is there.
    """
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(_SEARCHED)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _SEARCHED))
            if mark in head or mark in file.read():
                return
    raise FileExistsError(f"{path} exists already and was not written by shortcutflow: give another name, or remove it")


def require_place(out: Path, *suffixes: str) -> None:
    """Before any work: ``out`` can be written, as what its name says.

    Raises:
        ValueError: for another suffix than these.
        FileNotFoundError: if the folder that it is to be in does not exist.
        FileExistsError: as :func:`require_ours`.
    """
    if out.suffix.lower() not in suffixes:
        raise ValueError(f"--out must name a {' or '.join(suffixes)} file, got {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    require_ours(out)


def remove_leftovers(folder: Path, *, of_all: bool = False) -> None:
    """Remove unfinished files and folders of dead processes of this machine.

    Args:
        folder: where they lie.
        of_all: those of every process, where none is at work any more.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _UNFINISHED.fullmatch(path.name)
        if found and (of_all or (found[1] == _HOST and not _is_alive(int(found[2])))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
