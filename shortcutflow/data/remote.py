"""Files from ``http(s)://``, ``s3://``, ``gs://`` and ``hf://``, copied into a local cache that processes share.

A file is fetched whole, by ``curl``, ``aws`` or ``gsutil``, which are started without a shell, or by huggingface_hub.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from filelock import FileLock
from pydantic import AfterValidator

from shortcutflow.io.atomic import atomic_file

_CURL = (
    "curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--proto", "=http,https",
    "--connect-timeout", "30", "--speed-limit", "1", "--speed-time", "60",
)  # fmt: skip
_COMMANDS = {
    "http": ((*_CURL, "--", "{}"), (*_CURL, "--head", "--", "{}")),
    "s3": (("aws", "s3", "cp", "--only-show-errors", "{}", "-"), ("aws", "s3", "ls", "{}")),
    "gs": (("gsutil", "cat", "{}"), ("gsutil", "ls", "-l", "{}")),
}
"""Of each kind of URL: what writes its content, and what describes it."""
SCHEMES = ("http", "https", "s3", "gs", "hf")
TRIES = 5
FIRST_PAUSE = 1.0
"""Seconds after the first failure; twice as long after each further one."""
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class ReadError(OSError):
    """A file that the system could not read, or not fetch from its URL, naming it and the number of tries."""


def is_url(place: str | Path) -> bool:
    """Whether this is a URL, not a local path.

    Raises:
        ValueError: for a URL that files are not fetched from.
    """
    scheme, separator, _ = str(place).partition("://")
    if separator and scheme not in SCHEMES:
        raise ValueError(f"{place}: files are local or have a URL of {', '.join(SCHEMES)}, not {scheme!r}")
    return bool(separator)


PathOrUrl = Annotated[
    str | Path, AfterValidator(lambda place: str(place).rstrip("/") if is_url(place) else Path(place))
]
"""A field of a config; in this order of types, or a URL in JSON would be made a path."""


def local_copy(
    url: str, cache: Path, *, version: str | None = None, sha256: str | None = None, at_most: int = 2**63,
    limit: int | None = None, tries: int = TRIES,
) -> Path:  # fmt: skip
    """The local copy of a file, fetched unless the cache has it; several processes may call at once.

    Args:
        url: of the file; a local path is returned as it is.
        cache: folder of all copies, each in one of its own below it for its URL.
        version: identifies the content under this URL; None: what :func:`version_of` returns. Where that
            is empty, a file is fetched once.
        sha256: that the content must have; None takes any.
        at_most: bytes; a longer file is not kept.
        limit: bytes; the tar files of the cache that were not used for longest are deleted beyond it. None: no limit.
        tries: before it is an error, with pauses of 1, 2, 4, ... seconds.

    Raises:
        ReadError: naming the URL and the last failure.
    """
    if not is_url(url):
        return Path(url)
    path = cached_path(url, cache, version_of(url) if version is None else version)
    with suppress(FileNotFoundError):
        os.utime(path)  # its use, for deleting what was not used for longest
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            with_retries(lambda: _fetch(url, path, sha256, at_most), f"{url} could not be fetched", tries=tries)
            if limit is not None:
                _make_room(cache, limit, keep=path)
    return path


def open_copy(url: str, cache: Path, **options: Any) -> BufferedReader:
    """The same, opened: where the size of the cache is limited, another process may just have deleted it."""
    while True:
        with suppress(FileNotFoundError) if is_url(url) else nullcontext():
            return local_copy(url, cache, **options).open("rb")


def cached_path(url: str, cache: Path, version: str) -> Path:
    """Where the cache keeps this version of a file, whether it has it or not."""
    folder, parts = url.rpartition("/")[0], urlsplit(url)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", parts.path.rpartition("/")[2])[-100:].lstrip(".-") or "file"
    digest = hashlib.sha256((folder if url == f"{folder}/{name}" else url).encode(errors="replace")).hexdigest()
    stem, suffix = os.path.splitext(name)
    # Of the URL the host alone is readable: it may hold a password.
    return cache / f"{parts.hostname or ''}-{digest[:12]}" / f"{stem}-{version[:12] or '0' * 12}{suffix}"


def read_url(url: str, at_most: int) -> bytes:
    """The content of a small file; errors as of :func:`local_copy`."""
    with tempfile.TemporaryDirectory() as folder:
        return local_copy(url, Path(folder), version="", at_most=at_most).read_bytes()


def version_of(url: str) -> str:
    """Hexadecimal digits that change when the file at a URL does; empty if the server does not say."""
    try:
        if url.startswith("hf://"):
            found = _hub().info(url)
            text = f"{found['size']} {(found.get('lfs') or {}).get('sha256') or found.get('blob_id', '')}".encode()
        else:
            with _output(url, described=True) as answer:
                text = answer.read(2**16)
    except OSError as error:
        logger.debug("%s: no version (%s)", url, error)
        return ""
    if url.startswith("http"):
        text = b"".join(re.findall(rb"(?im)^(?:etag|last-modified|content-length):.*", text))
    return hashlib.sha256(text).hexdigest()[:32] if text else ""


def with_retries(
    action: Callable[[], Result], failure: str, *, tries: int = TRIES, remedy: str = "",
    between: Callable[[], object] = lambda: None,
) -> Result:  # fmt: skip
    """Call it; after an error of the disk or network again, with pauses of 1, 2, 4, ... seconds.

    Args:
        action: to call.
        failure: what it means that all tries fail, for the message.
        tries: how many.
        remedy: what to do about that, for the message.
        between: called before each further try.

    Raises:
        ReadError: when the last try failed too.
    """
    attempt = 1
    while True:
        try:
            return action()
        except ReadError:  # which was tried several times already
            raise
        except OSError as error:
            if attempt == tries:
                raise ReadError(f"{failure} in {tries} tries: {error}{remedy}") from error
            logger.warning("%s in try %d of %d (%s)", failure, attempt, tries, error)
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            between()
            attempt += 1


def _fetch(url: str, path: Path, sha256: str | None, at_most: int) -> None:
    """Download a file once; it is renamed into place only if it is complete and has the checksum."""
    digest, read = hashlib.sha256(), 0
    with atomic_file(path) as unfinished:
        with _output(url) as source, unfinished.open("wb") as out:
            while read <= at_most and (chunk := source.read(2**20)):
                read += len(chunk)
                digest.update(chunk)
                out.write(chunk)
        if read > at_most:
            raise OSError(f"it has more than the {at_most} bytes that are expected")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise OSError(f"the {read} bytes that came do not have the expected checksum (SHA-256)")


@contextmanager
def _output(url: str, *, described: bool = False) -> Iterator[BinaryIO]:
    """A file's content, or its description: what the command for this kind of URL writes.

    Raises ReadError if the command is not installed, and OSError with what it wrote to its standard error if it fails.
    """
    scheme = url.partition("://")[0].replace("https", "http")
    if scheme == "hf":
        with _hub().open(url, "rb", block_size=0) as stream:  # without blocks: one request, read once through
            yield stream
        return
    command = [part.format(url) for part in _COMMANDS[scheme][described]]
    if shutil.which(command[0]) is None:
        raise ReadError(f"{url} is fetched by the command {command[0]!r}, which is not installed")
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        try:
            yield cast(BinaryIO, process.stdout)
            is_read_to_its_end = not process.stdout.read(1)
        except BaseException:
            process.kill()
            raise
        if not is_read_to_its_end:
            process.kill()
        elif process.wait() != 0:
            errors.seek(0)
            raise OSError(errors.read(1000).decode(errors="replace").strip() or f"{command[0]} failed")


def _hub() -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise ReadError("hf:// needs huggingface_hub: pip install 'shortcutflow[hub]'") from error
    return HfFileSystem()


def _make_room(cache: Path, limit: int, keep: Path) -> None:
    """Delete the tar files that were not used for longest, until the others have at most ``limit`` bytes."""
    shards = []
    for path in cache.glob(f"*-{'[0-9a-f]' * 12}/*-{'[0-9a-f]' * 12}.tar"):
        with suppress(FileNotFoundError):  # another process makes room too
            shards.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    held = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if held <= limit or path == keep:
            break
        held -= size
        path.unlink(missing_ok=True)  # a process that has it open can read on
