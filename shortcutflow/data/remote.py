"""Folders of shards, here or elsewhere: from ``http(s)://``, ``s3://`` and ``gs://`` shards are fetched into a cache.

A shard is fetched whole, compared with the SHA-256 in the manifest and kept on the local disk, where its samples are
read in any order; every process of a machine uses the same cache. The transfer is done by the commands ``curl``,
``aws`` and ``gsutil``, which are started without a shell.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from shortcutflow.data.images import Crop
from shortcutflow.data.index import LARGEST_INDEX
from shortcutflow.data.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, ShardEntry
from shortcutflow.io.atomic import atomic_file, locked

_CURL = (
    "curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--proto", "=http,https",
    "--connect-timeout", "30", "--speed-limit", "1", "--speed-time", "60", "--",
)  # fmt: skip
COMMANDS = {
    "http": (*_CURL, "{}"),
    "https": (*_CURL, "{}"),
    "s3": ("aws", "s3", "cp", "--only-show-errors", "{}", "-"),
    "gs": ("gsutil", "cat", "{}"),
}
"""For each kind of URL, what writes the file at "{}" to its standard output. Retries are made here, not by them."""
VERSIONS = {
    "http": (*_CURL[:-1], "--head", "--", "{}"),
    "https": (*_CURL[:-1], "--head", "--", "{}"),
    "s3": ("aws", "s3", "ls", "{}"),
    "gs": ("gsutil", "ls", "-l", "{}"),
}
"""For each kind of URL, what writes a description that changes with the file; of HTTP, its headers."""
TRIES = 5
FIRST_PAUSE = 1.0
"""Seconds after the first failure; twice as long after each further one."""
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class FetchError(OSError):
    """A file of a URL that could not be fetched, naming it and the tries."""


class ShardFolder:
    """A folder of shards.

    Attributes:
        manifest: what they hold.
        crop: how images are made to the manifest's size when they are read; None: they have it.

    Args:
        place: a local folder, or a URL of one.
        cache: where shards of a URL are kept; a folder of its own below it for each URL.
        cache_limit: bytes; beyond it the shards that were not used for longest are deleted. None: no limit.

    Raises:
        FileNotFoundError: if a local folder holds no manifest, or lacks a shard that it lists.
        ValueError: for a manifest that does not parse, or a URL of another kind.
        FetchError: if the manifest cannot be fetched.
    """

    crop: Crop | None = None

    def __init__(self, place: str | Path, *, cache: Path, cache_limit: int | None = None) -> None:
        self.url = url_of(place)
        self._limit = cache_limit
        self._ahead: dict[str, Future[Path]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if self.url is None:
            self.path = Path(place)
            self.manifest = Manifest.read(self.path)
            self._require_files()
            return
        host = urlsplit(self.url).hostname or ""  # without a password, if the URL has one
        self.path = cache / f"{host}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"
        self.path.mkdir(parents=True, exist_ok=True)
        content = with_retries(lambda: self._read(MANIFEST, LARGEST_MANIFEST), f"{self.url}/{MANIFEST}")
        self.manifest = Manifest.parse(content, f"{self.url}/{MANIFEST}")

    def __str__(self) -> str:
        return self.url or str(self.path)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_ahead": {}, "_pool": None}

    def place_of(self, name: str) -> str:
        """Where a file of the folder lies: a path or a URL."""
        return f"{self.url or self.path}/{name}"

    def path_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard, fetched if it is not there yet."""
        return self._local(entry.name, entry.bytes, entry.sha256)

    def open(self, entry: ShardEntry) -> int:
        """A descriptor of a shard's file, to read from; fetched if it is not there yet."""
        while True:
            try:
                return os.open(self.path_of(entry), os.O_RDONLY)
            except FileNotFoundError:
                # Another process may just have deleted it to make room.
                if self.url is None:
                    raise

    def index_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard's index, fetched if it is not there yet."""
        return self._local(entry.index_name, None, entry.index_sha256)

    def fetch_ahead(self, entries: list[ShardEntry]) -> None:
        """Begin to fetch shards that will be needed soon; returns at once. Nothing to do for a local folder."""
        if self.url is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._ahead = {name: future for name, future in list(self._ahead.items()) if not future.done()}
        for entry in entries:
            if entry.name not in self._ahead and not self._kept_at(entry.name, entry.sha256).exists():
                # One try: whoever needs it tries again and says what is wrong.
                self._ahead[entry.name] = self._pool.submit(self._local, entry.name, entry.bytes, entry.sha256, 1)

    def wrong_sizes(self) -> list[str]:
        """Of a local folder: a sentence for each shard whose file has not the size in the manifest."""
        if self.url is not None:
            return []
        files = [(self.path / entry.name, entry.bytes) for entry in self.manifest.shards]
        return [
            f"shard {path} has {path.stat().st_size} bytes, {MANIFEST} says {said}: it is damaged or cut off"
            for path, said in files
            if path.stat().st_size != said
        ]

    def _require_files(self) -> None:
        for entry in self.manifest.shards:
            for name in (entry.name, entry.index_name):
                if not (self.path / name).is_file():
                    raise FileNotFoundError(f"shard {self.path / name} is missing, {self.path / MANIFEST} lists it")

    def _local(self, name: str, size: int | None, sha256: str, tries: int = TRIES) -> Path:
        if self.url is None:
            return self.path / name
        path = self._kept_at(name, sha256)
        with suppress(FileNotFoundError):
            os.utime(path)  # its use, for deleting what was not used for longest
            return path
        with locked(self.path / f".{path.name}.lock"):
            if not path.exists():
                with_retries(lambda: self._fetch(name, path, size, sha256), self.place_of(name), tries)
                self._make_room(keep=path)
        return path

    def _kept_at(self, name: str, sha256: str) -> Path:
        """Where the cache keeps a file; the checksum tells it from one that the URL held under this name before."""
        stem, suffix = os.path.splitext(name)
        return self.path / f"{stem}-{sha256[:12]}{suffix}"

    def _fetch(self, name: str, path: Path, size: int | None, sha256: str) -> None:
        """Download one file; it is renamed into place only if it is what the manifest says."""
        with atomic_file(path) as unfinished:
            digest, read = download(self.place_of(name), unfinished, LARGEST_INDEX if size is None else size)
            if digest != sha256:
                of = f" of {size}" if size is not None else ""
                raise OSError(f"what came ({read} bytes{of}) is not what the manifest says")

    def _read(self, name: str, at_most: int) -> bytes:
        with open_url(self.place_of(name)) as source:
            content = source.read(at_most + 1)
        if not content or len(content) > at_most:
            raise OSError(f"it has {len(content)} bytes or more, from 1 to {at_most} are read")
        return content

    def _make_room(self, keep: Path) -> None:
        if self._limit is None:
            return
        shards = []
        for path in self.path.glob(f"*-{'[0-9a-f]' * 12}.tar"):
            with suppress(FileNotFoundError):  # another process makes room too
                shards.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        held = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if held <= self._limit or path == keep:
                break
            held -= size
            # Whoever has it open can read on.
            path.unlink(missing_ok=True)


@contextmanager
def open_url(url: str, commands: Mapping[str, tuple[str, ...]] = COMMANDS) -> Iterator[BinaryIO]:
    """Read what the command for a URL writes: the file, with :data:`COMMANDS`; ``hf://`` is read by huggingface_hub.

    Raises:
        FetchError: if the command is not installed.
        OSError: with what the command wrote to its standard error, if it fails.
    """
    scheme = url.partition("://")[0]
    if scheme == "hf" and commands is COMMANDS:
        from huggingface_hub import HfFileSystem

        with HfFileSystem().open(url, "rb", block_size=0) as stream:  # without blocks: one request, read once through
            yield stream
        return
    command = [part.format(url) for part in commands[scheme]]
    if shutil.which(command[0]) is None:
        raise FetchError(f"{url} is fetched by the command {command[0]!r}, which is not installed")
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        try:
            yield cast(BinaryIO, process.stdout)
            is_whole = not process.stdout.read(1)
        except BaseException:
            process.kill()
            raise
        if not is_whole:
            process.kill()
        elif process.wait() != 0:
            said.seek(0)
            raise OSError(said.read(1000).decode(errors="replace").strip() or f"{command[0]} failed")


def download(url: str, path: Path, at_most: int = 2**63) -> tuple[str, int]:
    """Fetch a file once; gives the SHA-256 and size of what came, of which no more is kept than ``at_most`` bytes."""
    digest, read = hashlib.sha256(), 0
    with open_url(url) as source, path.open("wb") as out:
        while chunk := source.read(2**20):
            read += len(chunk)
            if read > at_most:
                break
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest(), read


def version_of(url: str) -> str:
    """A short text that changes when the file at a URL does; empty if the server does not say."""
    try:
        if url.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            found = HfFileSystem().info(url)
            return f"{found['size']} {(found.get('lfs') or {}).get('sha256') or found.get('blob_id', '')}"
        with open_url(url, VERSIONS) as answer:
            text = answer.read(2**16)
    except OSError as error:
        logger.debug("%s: no version (%s)", url, error)
        return ""
    if url.startswith("http"):
        text = b"".join(re.findall(rb"(?im)^(?:etag|last-modified|content-length):.*", text))
    return hashlib.sha256(text).hexdigest()[:32] if text else ""


def url_of(place: str | Path) -> str | None:
    """The URL without a trailing slash, or None for a local path.

    Raises:
        ValueError: for a URL of another kind than :data:`COMMANDS`.
    """
    scheme, separator, _ = str(place).partition("://")
    if not separator:
        return None
    if scheme not in COMMANDS:
        raise ValueError(f"{place}: shards are read from a local folder or from {', '.join(COMMANDS)}, not {scheme!r}")
    return str(place).rstrip("/")


def with_retries(action: Callable[[], Result], url: str, tries: int = TRIES) -> Result:
    """Do it; after a failure again, with pauses of 1, 2, 4, ... seconds.

    Raises:
        FetchError: naming the URL, when the last try failed too.
    """
    for attempt in range(1, tries + 1):
        try:
            return action()
        except FetchError:
            raise
        except OSError as error:
            if attempt == tries:
                raise FetchError(f"{url} could not be fetched in {tries} tries: {error}") from error
            logger.warning("%s: try %d of %d failed (%s)", url, attempt, tries, error)
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
    raise AssertionError("unreachable")
