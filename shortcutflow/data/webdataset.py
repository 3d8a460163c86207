"""Anybody's webdataset shards as a run's data, read where they lie.

Each shard's headers are read once, into an index of the kind that prepared shards have; then the same reader and stream
take both, so the order, the equal batches and the resume by one number are the same. Members go together by
webdataset's own rule. Its decoders are not used: some of them run code that a shard brings along.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from tqdm import tqdm

from shortcutflow.data.images import Crop
from shortcutflow.data.index import Index, IndexBuilder, file_version, read_index, write_index
from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.data.remote import is_url, local_copy, version_of
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.data.webdataset_files import Fields, expand, scan
from shortcutflow.distributed import Rank
from shortcutflow.io.atomic import locked, write_whole

SCAN_THREADS = 8
SHOWN = 5
"""Left-out samples that are printed; the list has all."""
logger = logging.getLogger(__name__)
_PLAIN = re.compile(r"[^A-Za-z0-9_.-]+")


class WebdatasetData(DataSettings):
    """Webdataset shards of images, local or at ``http(s)://``, ``s3://``, ``gs://`` or ``hf://``, as they are.

    Shards of URLs are fetched whole into ``cache``, where samples can be read in any order.
    """

    kind: Literal["webdataset"] = "webdataset"
    urls: str | tuple[str, ...] = Field(description="of shards, with {000..146} for several; or a file that lists them")
    size: int = Field(ge=1, le=4096, description="side in pixels that images are made to when they are read")
    crop: Crop = "released"
    image: str = Field(default="jpg;jpeg;png;webp", description="extensions of the image, the first there is")
    label: str | None = Field(default="cls", description="extension of the class, json:path.to.it, or null")
    num_classes: int | None = Field(default=None, ge=1, description="null: one more than the largest label")
    cache: Path = Path("data/cache")
    cache_limit: int | None = Field(default=None, ge=0, description="bytes of shards of URLs that are kept; null: all")

    def opened(self) -> ShardFolder:
        """The shards, indexed if they were not; several processes may call at once and share the work.

        Raises:
            FileNotFoundError: if a shard is not there.
            ValueError: if they hold no usable sample, a label is too large, or, with ``on_error="raise"``, some sample
                cannot be used.
        """
        shards = _open(self)
        if shards.skipped and self.on_error == "raise":
            raise ValueError(f"{_left_out(shards.skipped)}; data.on_error=skip trains without them")
        return shards

    def describe(self) -> DataInfo:
        """Three channels; the classes are found in the indexes unless they are given."""
        classes = self.num_classes
        if self.label is not None and classes is None:
            classes = _open(self).manifest.num_classes
        return DataInfo((3, self.size, self.size), classes if self.label is not None else None)


def _open(settings: WebdatasetData) -> WebdatasetShards:
    """The shards of these settings; once in a process, as long as the files do not change."""
    fields = set(WebdatasetData.model_fields) - set(DataSettings.model_fields)
    only = WebdatasetData.model_validate(settings.model_dump(include=fields))
    places = expand(only.urls)
    if missing := [place for place in places if not is_url(place) and not os.path.isfile(place)]:
        raise FileNotFoundError(f"data.urls names {missing[0]}, which is not there ({len(missing)} are missing)")
    return _opened(only, tuple(places), tuple(file_version(place) for place in places if not is_url(place)))


@lru_cache(maxsize=4)
def _opened(settings: WebdatasetData, places: tuple[str, ...], versions: tuple[str, ...]) -> WebdatasetShards:
    return WebdatasetShards(settings, places)


class _Shard(NamedTuple):
    """What is kept of a shard's index; the rest is read again where it is needed."""

    place: str
    index_path: Path
    version: str
    entry: ShardEntry | None
    largest_label: int
    skipped: tuple[tuple[str, str], ...]


class WebdatasetShards(ShardFolder):
    """Shards that were not written here, indexed: what a reader needs of them.

    Attributes:
        skipped: (name, reason) of what is no usable sample.
    """

    def __init__(self, settings: WebdatasetData, places: tuple[str, ...]) -> None:
        self.place = settings.urls if isinstance(settings.urls, str) else ", ".join(settings.urls)
        self.crop, self._cache, self._limit = settings.crop, settings.cache, settings.cache_limit
        self.is_remote = any(is_url(place) for place in places)
        self._ahead, self._pool = {}, None
        self.path = settings.cache / "webdataset"
        self._fields = Fields.of(settings.image, settings.label)
        self.path.mkdir(parents=True, exist_ok=True)
        found = self._indexed(places)
        self.skipped = tuple(item for shard in found for item in shard.skipped)
        usable = [shard for shard in found if shard.entry is not None]
        if self.skipped:
            self._list_skipped(settings)
        if not usable:
            raise ValueError(
                f"data.urls={settings.urls!r}: no sample can be used. {_left_out(self.skipped)}. data.image and "
                "data.label name the members (json:path.to.label reads JSON), data.label=null trains without labels"
            )
        entries = tuple(shard.entry for shard in usable if shard.entry is not None)
        self._shards = {entry.name: shard for entry, shard in zip(entries, usable, strict=True)}
        self.manifest = Manifest(
            shape=(3, settings.size, settings.size), format="jpg", num_classes=_classes(settings, usable),
            preprocessing=f"webdataset shards; crop {settings.crop} when they are read", shards=entries,
        )  # fmt: skip

    def place_of(self, name: str) -> str:
        """The path or URL of a shard."""
        return self._shards[name].place

    def version_of(self, entry: ShardEntry) -> str:
        """What its server said of a shard when it was indexed."""
        return self._shards[entry.name].version

    def index_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard's index."""
        return self._shards[entry.name].index_path

    def wrong_sizes(self) -> list[str]:
        """None: each shard has just been compared with its index."""
        return []

    def _indexed(self, places: tuple[str, ...]) -> list[_Shard]:
        """Every shard with its index, which is written where it is missing or not of this version of the shard."""
        rank = Rank.from_environment()
        # Each process begins elsewhere, so that they share the work.
        begin = len(places) * rank.number // rank.world_size
        order = [*range(begin, len(places)), *range(begin)]
        with (
            ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="index") as pool,
            tqdm(total=len(places), desc="indexing shards", unit="shard", delay=2, disable=rank.number > 0) as bar,
        ):
            found = {}
            for i, shard in zip(order, pool.map(lambda i: self._with_index(places[i]), order), strict=True):
                found[i] = shard
                bar.update()
        return [found[i] for i in range(len(places))]

    def _with_index(self, place: str) -> _Shard:
        version = version_of(place) if is_url(place) else file_version(place)
        where = place if is_url(place) else os.path.abspath(place)
        stem = _PLAIN.sub("_", Path(place).name.removesuffix(".tar")).lstrip(".-")[:100]
        name = f"{stem or 'shard'}-{hashlib.sha256(where.encode(errors='replace')).hexdigest()[:8]}.tar"
        paths = [self.path / f"{name}.{self._fields.digest}.index"]
        if not is_url(place):
            paths.insert(0, Path(f"{place}.shortcutflow-{self._fields.digest}.index"))
        if (shard := _found(place, paths, version)) is not None:
            return shard
        with locked(self.path / f".{paths[-1].name}.lock"):
            if (shard := _found(place, paths, version)) is not None:  # another process has written it meanwhile
                return shard
            if any(_is_index(path) for path in paths):
                logger.warning("%s has changed since it was indexed; it is indexed anew", place)
            with self._opened_copy(place, version) as file:
                builder, skipped = scan(file, Path(place).name, self._fields)
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                # A local file is not read through.
                sha256 = hashlib.file_digest(file, "sha256") if is_url(place) else hashlib.sha256(version.encode())
            return _written(place, paths, version, builder, skipped, ShardEntry.model_construct(
                name=name, samples=builder.samples, bytes=size, sha256=sha256.hexdigest(), index_sha256="0" * 64
            ))  # fmt: skip

    def _opened_copy(self, place: str, version: str) -> BufferedReader:
        while is_url(place):
            with suppress(FileNotFoundError):  # deleted by another process to make room
                return local_copy(place, self._cache, version=version, limit=self._limit).open("rb")
        return Path(place).open("rb")

    def _list_skipped(self, settings: WebdatasetData) -> None:
        """Print how many samples are left out and where they are listed."""
        content = "".join(f"{' '.join(name.split())}\t{reason}\n" for name, reason in self.skipped)
        digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
        path = self.path / f"left-out-{digest}.txt"
        write_whole(path, content)
        if Rank.from_environment().number == 0:
            print(f"{_left_out(self.skipped)}; all are listed in {path}", file=sys.stderr)


def _left_out(skipped: Sequence[tuple[str, str]]) -> str:
    shown = "; ".join(f"{name} ({reason})" for name, reason in skipped[:SHOWN])
    return f"{len(skipped)} samples are left out, such as {shown}" if skipped else "They hold none"


def _classes(settings: WebdatasetData, shards: Sequence[_Shard]) -> int | None:
    """The number of classes, at least as many as the labels need."""
    if settings.label is None:
        return None
    last = max(shards, key=lambda shard: shard.largest_label)
    if settings.num_classes is not None and last.largest_label >= settings.num_classes:
        raise ValueError(
            f"{last.place} holds the label {last.largest_label}, data.num_classes={settings.num_classes} takes labels "
            f"up to {settings.num_classes - 1}"
        )
    return settings.num_classes or last.largest_label + 1


def _found(place: str, paths: Sequence[Path], version: str) -> _Shard | None:
    """A shard with its index, if there is one of this version."""
    for path in paths:
        try:
            index = read_index(path)
        except (FileNotFoundError, ValueError):
            continue
        if index.version == version or (is_url(place) and "" in (version, index.version)):
            return _shard(place, path, index)
    return None


def _shard(place: str, path: Path, index: Index) -> _Shard:
    largest = int(index.label.max()) if index.label is not None and len(index.label) else -1
    return _Shard(place, path, index.version, index.entry, largest, index.skipped)


def _written(
    place: str, paths: Sequence[Path], version: str, builder: IndexBuilder, skipped: list[tuple[str, str]],
    entry: ShardEntry,
) -> _Shard:  # fmt: skip
    """Write an index beside its shard, or else into the cache: where that cannot be, or another file has its name."""
    checked = ShardEntry.model_validate(entry.model_dump()) if builder.samples else None
    for path in paths:
        if path is not paths[-1] and path.exists() and not _is_index(path):
            continue
        try:
            write_index(path, builder, checked, skipped, version)
        except OSError:
            if path is paths[-1]:
                raise
        else:
            return _shard(place, path, read_index(path))
    raise AssertionError("unreachable")


def _is_index(path: Path) -> bool:
    try:
        return bool(read_index(path).version)
    except (OSError, ValueError):
        return False
