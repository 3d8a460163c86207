"""JSON objects from untrusted files: bounded in size, refused in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

LONGEST_CONFIG = 2**20
"""Bytes of a config that are read."""
RESTORE = "restore it from a copy, or make it again"


def read_object(path: Path, what: str, *, longest: int = LONGEST_CONFIG, remedy: str = RESTORE) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: of the file.
        what: it should describe, for messages: "a model".
        longest: bytes that are read.
        remedy: what to do about a damaged one, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is longer, no JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which would describe {what}")
    if path.stat().st_size > longest:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a description of {what} has at most {longest}")
    try:
        text = ""
        text = path.read_text()
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        what_it_is = "is empty" if not text.strip() else f"is not JSON, or cut off ({error})"
        raise ValueError(f"{path}, which describes {what}, {what_it_is}: {remedy}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not describe {what}: it must hold an object, not a {type(values).__name__}")
    return values


def wrong_fields(error: ValidationError, *, most: int = 10) -> str:
    """What is wrong with the fields of a config or file, each by its name: ``size: ..., got 0``."""
    lines = []
    for problem in error.errors()[:most]:
        field = ".".join(str(part) for part in problem["loc"])
        given = "" if problem["type"] in ("value_error", "missing") else f", got {repr(problem['input'])[:80]}"
        lines.append((f"{field}: " if field else "") + problem["msg"].removeprefix("Value error, ") + given)
    return "; ".join(lines)
