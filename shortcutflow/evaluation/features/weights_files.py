"""Published files of weights: where they are looked for, how they are fetched, and which file a result came from."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shortcutflow.data.remote import local_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedFile:
    """A file that somebody publishes.

    Attributes:
        name: of the file, if it is put into the cache folder by hand.
        url: where it is fetched from.
        publisher: who publishes it, for messages.
        sha256: of its bytes; None if no public source states it.
        largest: bytes; a longer file is refused before it is read.
        also_at: where another program keeps the same file. It is used from there only if it has the checksum.
    """

    name: str
    url: str
    publisher: str
    sha256: str | None
    largest: int
    also_at: Path | None = None


class HeldFile(NamedTuple):
    """A file that was read: path, bytes, and the SHA-256 (hexadecimal) of these very bytes."""

    path: Path
    content: bytes
    sha256: str


def cache_folder() -> Path:
    """Where weights are kept: the environment's SHORTCUTFLOW_CACHE, or ``~/.cache/shortcutflow``."""
    return Path(os.environ.get("SHORTCUTFLOW_CACHE") or Path.home() / ".cache" / "shortcutflow")


def weights_of(file: PublishedFile, given: Path | None = None) -> HeldFile:
    """A published file from the path that was given, or from the cache, which fetches it if need be.

    A file that was given by its path may be another one than the published: a warning says so, and its checksum is in
    the name of what is made of it. Any other must be the published one, if its checksum is known.

    Raises:
        FileNotFoundError: if the path that was given is not there.
        OSError: if it is nowhere and cannot be fetched; says where it may be put by hand.
        ValueError: if what is in the cache is not the published file, or any file is too large.
    """
    if given is not None:
        held = read_file(given, file.largest)
        if file.sha256 not in (None, held.sha256):
            logger.warning(
                "%s is not the published %s (SHA-256 %s, not %s): what it measures compares only with itself",
                given, file.name, held.sha256, file.sha256,
            )  # fmt: skip
        return held
    path = cache_folder() / file.name
    if not path.is_file():
        if file.sha256 is not None and file.also_at is not None and file.also_at.is_file():
            held = read_file(file.also_at, file.largest)
            if held.sha256 == file.sha256:
                return held
        try:
            path = local_copy(
                file.url, cache_folder(), version=file.sha256 or "", sha256=file.sha256, at_most=file.largest, tries=2
            )
        except OSError as error:
            reason = " ".join(str(error).split())
            checksum = f"SHA-256 {file.sha256}" if file.sha256 else "no public source states its SHA-256, reports do"
            raise OSError(
                f"the weights {file.name} are not at {path} and could not be fetched ({reason}): put the file there by "
                f"hand, or give its path (--extractor-weights). It is published by {file.publisher} at {file.url} "
                f"({checksum})"
            ) from error
    held = read_file(path, file.largest)
    if file.sha256 not in (None, held.sha256):
        raise ValueError(
            f"{path} is not the published file: its SHA-256 is {held.sha256}, not {file.sha256}; "
            f"delete it, and it is fetched again from {file.url}"
        )
    return held


def read_file(path: Path, largest: int) -> HeldFile:
    """A whole file and its checksum; ValueError if it is longer than ``largest`` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{path} has {size} bytes; a file of weights of at most {largest} is read here")
        content = file.read(largest + 1)
    return HeldFile(path, content, hashlib.sha256(content).hexdigest())
