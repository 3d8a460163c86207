"""A folder of shards, local or at a URL: its manifest, and the local file of each shard and index."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from shortcutflow.data.images import Crop
from shortcutflow.data.index import LARGEST_INDEX, file_version
from shortcutflow.data.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, ShardEntry
from shortcutflow.data.remote import TRIES, cached_path, is_url, local_copy, open_copy, read_url


class ShardFile(NamedTuple):
    """Where a shard and its index are (path or URL), and what tells its content from another under the same URL."""

    place: str
    index_place: str
    version: str


class ShardFolder:
    """A folder of shards.

    A shard of a URL is fetched whole, compared with the SHA-256 in the manifest and kept on the local disk, where its
    samples are read in any order; every process of a machine uses the same cache.

    Attributes:
        manifest: what the shards hold.
        place: the folder's path or URL.
        crop: how images are made to the manifest's size when they are read; None: they have it.

    Args:
        place: a local folder, or a URL of one.
        cache: where shards of a URL are kept; a folder of its own below it for each URL.
        cache_limit: bytes; beyond it the shards that were not used for longest are deleted. None: no limit.

    Raises:
        FileNotFoundError: if a local folder holds no manifest, or lacks a shard that it lists.
        ValueError: for a manifest that does not parse, or a URL of another kind.
        ReadError: if the manifest cannot be fetched.
    """

    crop: Crop | None = None
    _pool: ThreadPoolExecutor | None = None

    def __init__(self, place: str | Path, *, cache: Path = Path("data/cache"), cache_limit: int | None = None) -> None:
        self.place, self._cache, self._limit = str(place), cache, cache_limit
        self._ahead: dict[str, Future[Path]] = {}
        if is_url(place):
            self.place = self.place.rstrip("/")
            content = read_url(f"{self.place}/{MANIFEST}", LARGEST_MANIFEST)
            self.manifest = Manifest.parse(content, f"{self.place}/{MANIFEST}")
        else:
            self.manifest = Manifest.read(Path(place))
        self._watch([] if is_url(place) else [Path(place) / MANIFEST])
        self._files = {
            entry.name: ShardFile(f"{self.place}/{entry.name}", f"{self.place}/{entry.index_name}", entry.sha256)
            for entry in self.manifest.shards
        }
        for file in self._files.values():
            for path in (file.place, file.index_place):
                if not is_url(path) and not Path(path).is_file():
                    raise FileNotFoundError(f"shard {path} is missing, {Path(place) / MANIFEST} lists it")

    def __str__(self) -> str:
        return self.place

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_ahead": {}, "_pool": None}

    def _watch(self, files: list[Path]) -> None:
        """Remember the versions of the local files whose change makes the folder another one."""
        self._watched = {file: file_version(file) for file in files}

    def has_changed(self) -> bool:
        """Whether the data was replaced since it was opened, as far as local files show."""
        try:
            return any(file_version(file) != version for file, version in self._watched.items())
        except OSError:
            return True

    @property
    def is_remote(self) -> bool:
        """Whether a shard has a URL."""
        return any(is_url(file.place) for file in self._files.values())

    def place_of(self, entry: ShardEntry) -> str:
        """The path or URL of a shard."""
        return self._files[entry.name].place

    def path_of(self, entry: ShardEntry, tries: int = TRIES) -> Path:
        """The local file of a shard, fetched if it is not there yet."""
        return local_copy(self.place_of(entry), self._cache, **self._expected(entry), tries=tries)

    def open_shard(self, entry: ShardEntry) -> BufferedReader:
        """The same, opened."""
        return open_copy(self.place_of(entry), self._cache, **self._expected(entry))

    def _expected(self, entry: ShardEntry) -> dict[str, Any]:
        version = self._files[entry.name].version
        return {"version": version, "sha256": entry.sha256, "at_most": entry.bytes, "limit": self._limit}

    def index_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard's index, fetched if it is not there yet."""
        place, sha256 = self._files[entry.name].index_place, entry.index_sha256
        return local_copy(place, self._cache, version=sha256, sha256=sha256, at_most=LARGEST_INDEX)

    def fetch_ahead(self, entries: list[ShardEntry]) -> None:
        """Begin to fetch shards that will be needed soon; returns at once. Nothing to do for local ones."""
        self._ahead = {name: future for name, future in list(self._ahead.items()) if not future.done()}
        for entry in entries:
            place, _, version = self._files[entry.name]
            if not is_url(place) or entry.name in self._ahead:
                continue
            if not cached_path(place, self._cache, version).exists():
                self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="shards")
                # One try: the read that needs it tries again and reports the error.
                self._ahead[entry.name] = self._pool.submit(self.path_of, entry, 1)

    def wrong_sizes(self) -> list[str]:
        """A sentence for each local shard whose file has not the size in the manifest."""
        local = [entry for entry in self.manifest.shards if not is_url(self.place_of(entry))]
        return [
            f"shard {self.place_of(entry)} has {size} bytes, {MANIFEST} says {entry.bytes}: it is damaged or cut off"
            for entry in local
            if (size := os.path.getsize(self.place_of(entry))) != entry.bytes
        ]
