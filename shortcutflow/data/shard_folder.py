"""A folder of shards, local or at a URL: its manifest, and the local file of each shard and index."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from shortcutflow.data.images import Crop
from shortcutflow.data.index import LARGEST_INDEX
from shortcutflow.data.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, ShardEntry
from shortcutflow.data.remote import TRIES, cached_path, is_url, local_copy, read_url


class ShardFolder:
    """A folder of shards.

    A shard of a URL is fetched whole, compared with the SHA-256 in the manifest and kept on the local disk, where its
    samples are read in any order; every process of a machine uses the same cache.

    Attributes:
        manifest: what the shards hold.
        place: the folder's path or URL.
        is_remote: whether a shard has a URL.
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
        self.is_remote = is_url(place)
        self.place = str(place).rstrip("/") if self.is_remote else str(place)
        self._cache, self._limit = cache, cache_limit
        self._ahead: dict[str, Future[Path]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if self.is_remote:
            content = read_url(f"{self.place}/{MANIFEST}", LARGEST_MANIFEST)
            self.manifest = Manifest.parse(content, f"{self.place}/{MANIFEST}")
            return
        self.manifest = Manifest.read(Path(place))
        for entry in self.manifest.shards:
            for path in (self.path_of(entry), self.index_of(entry)):
                if not path.is_file():
                    raise FileNotFoundError(f"shard {path} is missing, {Path(place) / MANIFEST} lists it")

    def __str__(self) -> str:
        return self.place

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_ahead": {}, "_pool": None}

    def place_of(self, name: str) -> str:
        """The path or URL of a file of the folder."""
        return f"{self.place}/{name}"

    def version_of(self, entry: ShardEntry) -> str:
        """What tells a shard's content from another under the same URL, in the cache's file names."""
        return entry.sha256

    def path_of(self, entry: ShardEntry, tries: int = TRIES) -> Path:
        """The local file of a shard, fetched if it is not there yet."""
        place = self.place_of(entry.name)
        if not is_url(place):
            return Path(place)
        return local_copy(
            place, self._cache, version=self.version_of(entry), sha256=entry.sha256, at_most=entry.bytes,
            limit=self._limit, tries=tries,
        )  # fmt: skip

    def index_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard's index, fetched if it is not there yet."""
        place, sha256 = self.place_of(entry.index_name), entry.index_sha256
        if not is_url(place):
            return Path(place)
        return local_copy(place, self._cache, version=sha256, sha256=sha256, at_most=LARGEST_INDEX)

    def fetch_ahead(self, entries: list[ShardEntry]) -> None:
        """Begin to fetch shards that will be needed soon; returns at once. Nothing to do for local ones."""
        self._ahead = {name: future for name, future in list(self._ahead.items()) if not future.done()}
        for entry in entries:
            place = self.place_of(entry.name)
            if not is_url(place) or entry.name in self._ahead:
                continue
            if not cached_path(place, self._cache, self.version_of(entry)).exists():
                self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="shards")
                # One try: whoever needs it tries again and says what is wrong.
                self._ahead[entry.name] = self._pool.submit(self.path_of, entry, 1)

    def wrong_sizes(self) -> list[str]:
        """Of a local folder: a sentence for each shard whose file has not the size in the manifest."""
        if self.is_remote:
            return []
        files = [(self.path_of(entry), entry.bytes) for entry in self.manifest.shards]
        return [
            f"shard {path} has {path.stat().st_size} bytes, {MANIFEST} says {expected}: it is damaged or cut off"
            for path, expected in files
            if path.stat().st_size != expected
        ]
