"""Published files of weights: where they are looked for, how they are fetched, and which file a result came from."""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shortcutflow.io.atomic import atomic_file, locked

CACHE_VARIABLE = "SHORTCUTFLOW_CACHE"
TIMEOUT = 30.0
"""Seconds without an answer, after which a download is given up."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedFile:
    """A file that somebody publishes.

    Attributes:
        name: what it is called in the cache folder.
        url: where it is fetched from.
        publisher: who publishes it, for people.
        sha256: of its bytes; None if no public source states it.
        largest: bytes; a longer file is refused before it is read.
        also_at: where another program keeps the same file. It is used from there only if it has the checksum.
    """

    name: str
    url: str
    publisher: str
    sha256: str | None
    largest: int
    also_at: tuple[Path, ...] = ()


class HeldFile(NamedTuple):
    """A file that was read: the checksum is that of the very bytes that are used.

    Attributes:
        path: where it came from.
        content: its bytes.
        sha256: of them, in hexadecimal.
    """

    path: Path
    content: bytes
    sha256: str


def cache_folder() -> Path:
    """Where weights are kept: the environment's SHORTCUTFLOW_CACHE, or ``~/.cache/shortcutflow``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "shortcutflow")


def weights_of(file: PublishedFile, given: Path | None = None) -> HeldFile:
    """A published file from the path that was given, or from the cache, which fetches it if need be.

    A file that was given by its path may be another one than the published: a warning says so, and its checksum is in
    the name of what is made of it. A file that was found must be the published one, if its checksum is known.

    Raises:
        FileNotFoundError: if the path that was given is not there.
        OSError: if it is nowhere and cannot be fetched; says where it may be put by hand.
        ValueError: if what is in the cache is not the published file, or any file is too large.
    """
    if given is not None:
        held = read_file(given, file.largest)
        if file.sha256 is not None and held.sha256 != file.sha256:
            logger.warning(
                "%s is not the published %s (SHA-256 %s, not %s): what it measures compares only with itself",
                given, file.name, held.sha256, file.sha256,
            )  # fmt: skip
        return held
    place = cache_folder() / file.name
    if not place.is_file():
        for other in file.also_at if file.sha256 is not None else ():
            if other.is_file() and (held := read_file(other, file.largest)).sha256 == file.sha256:
                return held
        _fetch(file, place)
    held = read_file(place, file.largest)
    if file.sha256 is not None and held.sha256 != file.sha256:
        raise ValueError(
            f"{place} is not the published file: its SHA-256 is {held.sha256}, not {file.sha256}; "
            f"delete it, and it is fetched again from {file.url}"
        )
    return held


def read_file(path: Path, largest: int) -> HeldFile:
    """A whole file and its checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is longer than ``largest`` bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{path} has {size} bytes; a file of weights of at most {largest} is read here")
        content = file.read(largest + 1)
    return HeldFile(path, content, hashlib.sha256(content).hexdigest())


def _fetch(file: PublishedFile, place: Path) -> None:
    """Download it into the cache; of several processes one does, and the others wait for it."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent / f".{file.name}.lock"):
            if not place.is_file():
                _download(file, place)
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        said = f"SHA-256 {file.sha256}" if file.sha256 else "no public source states its SHA-256, reports state it"
        raise OSError(
            f"the weights {file.name} are not at {place} and could not be fetched ({reason}): put the file there by "
            f"hand, or give its path (--extractor-weights). It is published by {file.publisher} at {file.url} ({said})"
        ) from error


def _download(file: PublishedFile, place: Path) -> None:
    logger.info("fetching %s from %s", file.name, file.url)
    with atomic_file(place) as unfinished:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as source, unfinished.open("wb") as out:
            stated = int(source.headers.get("Content-Length") or 0)
            if stated > file.largest:
                raise OSError(f"it has {stated} bytes, at most {file.largest} are expected")
            digest, came = hashlib.sha256(), 0
            while chunk := source.read(2**20):
                came += len(chunk)
                if came > file.largest:
                    raise OSError(f"more than {file.largest} bytes come")
                digest.update(chunk)
                out.write(chunk)
        if stated and came != stated:
            raise OSError(f"{came} of {stated} bytes came")
        if file.sha256 not in (None, digest.hexdigest()):
            raise OSError(f"what came has SHA-256 {digest.hexdigest()}")
