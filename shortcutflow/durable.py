"""Files that survive a kill or a loss of power: whole on the disk, or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name, force it onto the disk, and only then give it its name.

    What a kill leaves is called ``.NAME.unfinished-PID``. Characters that UTF-8 lacks are written as escapes.
    """
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    unfinished.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    sync(unfinished)
    unfinished.replace(path)


def sync(path: Path) -> None:
    """Force a file or folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
