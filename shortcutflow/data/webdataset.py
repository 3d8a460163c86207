"""Webdataset shards of any origin as a run's data, read where they lie.

Each shard's headers are read once, into an index of the kind that prepared shards have; then the same reader and stream
take both, so the order, the equal batches and the resume by one number are the same. Members form samples by
webdataset's own rule. Its decoders are not used: some of them run code that a shard brings along.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from filelock import FileLock
from pydantic import Field
from tqdm import tqdm

from shortcutflow.data.images import Crop
from shortcutflow.data.index import LARGEST_SAMPLE, ByteRange, IndexRow, Skipped, file_version, read_index, write_index
from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.data.remote import SCHEMES, is_url, open_copy, version_of
from shortcutflow.data.shard_folder import ShardFile, ShardFolder
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.data.sources import braced
from shortcutflow.data.sources.archives import refuse_compressed, tar_members
from shortcutflow.data.sources.labels import NoLabel, plain_label
from shortcutflow.data.sources.readers import RawItem
from shortcutflow.data.sources.webdataset import LARGEST_LABEL, by_key, key_and_extension, label_value
from shortcutflow.distributed import Rank
from shortcutflow.io.atomic import write_whole

SCAN_THREADS = 8
SHOWN = 5
"""Left-out samples that are printed; the list has all."""
logger = logging.getLogger(__name__)
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.-]+")
_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset passes over."""


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

    def open_folder(self) -> ShardFolder:
        """The shards, indexed if they were not; several processes may call at once and share the work.

        Raises:
            FileNotFoundError: if a shard is not there.
            ValueError: if they hold no usable sample, or a label is too large.
        """
        places = expand(self.urls)
        if missing := [place for place in places if not is_url(place) and not os.path.isfile(place)]:
            raise FileNotFoundError(f"data.urls names {missing[0]}, which is not there ({len(missing)} are missing)")
        return WebdatasetShards(self, places)

    def opened(self) -> ShardFolder:
        """The same, opened once a process, and again if its files have changed.

        Raises:
            ValueError: with ``on_error="raise"``, if some sample cannot be used.
        """
        shards = super().opened()
        if self.on_error == "raise" and shards.skipped:
            raise ValueError(f"{_left_out(shards.skipped)}; data.on_error=skip trains without them")
        return shards

    def describe(self) -> DataInfo:
        """Three channels; the classes are found in the indexes unless they are given."""
        if self.label is not None and self.num_classes is None:
            return super().describe()
        return DataInfo((3, self.size, self.size), self.num_classes if self.label is not None else None)


def expand(urls: str | tuple[str, ...]) -> list[str]:
    """The shards that URLs with braces, or list files, stand for.

    Raises:
        ValueError: for URLs of another kind, and if there are none, or one comes twice.
    """
    places: list[str] = []
    for url in (urls,) if isinstance(urls, str) else urls:
        if "://" not in url and not url.endswith(".tar") and Path(url).is_file():
            lines = [line.strip() for line in Path(url).read_text(encoding="utf-8").splitlines()]
            found = [place for line in lines if line and not line.startswith("#") for place in braced(line)]
            # Relative to the list, so that both can be moved together.
            places += [place if "://" in place else str(Path(url).parent / place) for place in found]
        else:
            places += braced(url)
    for place in places:
        if ("://" in place and place.partition("://")[0] not in SCHEMES) or re.match(r"[a-z]{2,}:(?!//)", place):
            raise ValueError(
                f"{place}: shards are local files or have a URL of {', '.join(SCHEMES)}; no command is run"
            )
    if not places:
        raise ValueError(f"data.urls={urls!r} names no shard")
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise ValueError(f"data.urls names {twice[0]} twice, and {len(twice) - 1} more")
    return places


def scan(file: BinaryIO, name: str, image: str, label: str | None) -> tuple[list[IndexRow], list[Skipped]]:
    """Read a shard's headers and labels: its samples in their order, and what is none.

    Members with the same key are one sample, wherever in the shard they lie. What follows damage is left out.

    Args:
        file: the shard.
        name: its name, for messages.
        image: extensions of a sample's image, ``jpg;png``: the first that there is counts.
        label: extension of the member that holds its class, ``json:path.to.label`` within one, or None.

    Raises:
        ValueError: if it is compressed, so that samples cannot be read in any order.
    """
    files, damage = list[RawItem](), list[Skipped]()
    refuse_compressed(name, file.read(8))
    try:
        for member in tar_members(file, 0, os.fstat(file.fileno()).st_size, name):
            is_member = key_and_extension(member.name)[1] and not _META.match(member.name)
            if is_member and member.isreg() and not member.issparse():
                files.append(RawItem(member.name, None, (member.offset_data, member.size)))
    except ValueError as error:
        damage.append(Skipped(name, f"{error}; {len(files)} members before that are used"))
    samples, skipped = by_key(files)
    rows = []
    for key, members in samples.items():
        try:
            rows.append(_row(file.fileno(), key, members, image, label))
        except ValueError as error:
            skipped.append(Skipped(key, str(error)))
    return rows, damage + skipped


def _row(file: int, key: str, members: dict[str, RawItem], image: str, label: str | None) -> IndexRow:
    """A sample's image and label; raises ValueError if it lacks one or they cannot be used."""

    def read(member: RawItem) -> bytes:
        offset, size = (int(value) for value in member.place)
        return os.pread(file, min(size, LARGEST_LABEL + 1), offset)

    extension = next((extension for extension in image.lower().split(";") if extension in members), None)
    if extension is None:
        raise ValueError(f"no image ({image}) among its members: {', '.join(members)}"[:200])
    offset, size = (int(value) for value in members[extension].place)
    if size > LARGEST_SAMPLE:
        raise ValueError(f"its image has {size} bytes, at most {LARGEST_SAMPLE} are read")
    number: int | None = None
    if label:
        if (value := label_value(members, label, read)) is None:
            raise ValueError(f"no label ({label}) among its members: {', '.join(members)}"[:200])
        found = plain_label(value)
        if isinstance(found, NoLabel):
            raise ValueError(found.reason)
        if isinstance(found, str):
            raise ValueError(f"its label is {found[:40]!r}, not a number")
        number = found
    return IndexRow([ByteRange(offset, size, -1)], number, None, key)


class _Shard(NamedTuple):
    """What is kept of a shard's index; the rest is read again where it is needed."""

    file: ShardFile
    entry: ShardEntry | None
    largest_label: int
    skipped: tuple[Skipped, ...]


class WebdatasetShards(ShardFolder):
    """Shards without a manifest: it is made from their indexes, which the cache keeps."""

    def __init__(self, settings: WebdatasetData, places: Sequence[str]) -> None:
        self.place = settings.urls if isinstance(settings.urls, str) else ", ".join(settings.urls)
        self.crop, self._cache, self._limit = settings.crop, settings.cache, settings.cache_limit
        self._fields = (settings.image, settings.label)
        self._folder = settings.cache / "webdataset"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._watch([Path(place) for place in places if not is_url(place)])
        found = self._indexed(places)
        self.skipped = tuple(item for shard in found for item in shard.skipped)
        if self.skipped:
            path = self._folder / f"left-out-{_digest(settings.model_dump_json())}.txt"
            write_whole(path, "".join(f"{' '.join(name.split())}\t{reason}\n" for name, reason in self.skipped))
            if Rank.from_environment().is_main:
                print(f"{_left_out(self.skipped)}; all are listed in {path}", file=sys.stderr)
        entries = tuple(shard.entry for shard in found if shard.entry is not None)
        if not entries:
            raise ValueError(
                f"data.urls={settings.urls!r}: no sample can be used. {_left_out(self.skipped)}. data.image and "
                "data.label name the members (json:path.to.label reads JSON), data.label=null trains without labels"
            )
        self._files = {shard.entry.name: shard.file for shard in found if shard.entry is not None}
        self.manifest = Manifest(
            shape=(3, settings.size, settings.size), format="jpg", num_classes=_classes(settings, found),
            preprocessing=f"webdataset shards; crop {settings.crop} when they are read", shards=entries,
        )  # fmt: skip

    def _indexed(self, places: Sequence[str]) -> list[_Shard]:
        """Every shard with its index, which is written where it is missing or not of this version of the shard."""
        rank = Rank.from_environment()
        # Each process begins elsewhere, so that they share the work.
        begin = len(places) * rank.number // rank.world_size
        order = [*range(begin, len(places)), *range(begin)]
        with ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="index") as pool:
            shards = tqdm(
                pool.map(lambda i: self._with_index(places[i]), order), "indexing shards", len(places), unit="shard",
                delay=2, disable=rank.number > 0,
            )  # fmt: skip
            return [shard for _, shard in sorted(zip(order, shards, strict=True))]

    def _with_index(self, place: str) -> _Shard:
        version = version_of(place) if is_url(place) else file_version(place)
        where = place if is_url(place) else os.path.abspath(place)
        stem = _NOT_PLAIN.sub("_", Path(place).name.removesuffix(".tar")).lstrip(".-")[:100]
        name = f"{stem or 'shard'}-{_digest(where)}.tar"
        path = self._folder / f"{name}.{_digest(repr(self._fields))}.index"
        if (shard := _read(place, path, version)) is not None:  # without a lock, for which a cache must be writable
            return shard
        with FileLock(path.with_name(f".{path.name}.lock")):
            if (shard := _read(place, path, version)) is not None:  # another process has written it meanwhile
                return shard
            if path.exists():
                logger.warning("%s has changed since it was indexed; it is indexed anew", place)
            with open_copy(place, self._cache, version=version, limit=self._limit) as file:
                rows, skipped = scan(file, Path(place).name, *self._fields)
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                # A local file is not read through.
                sha256 = hashlib.file_digest(file, "sha256") if is_url(place) else hashlib.sha256(version.encode())
            digest = sha256.hexdigest()
            write_index(path, rows, name=name, size=size, sha256=digest, skipped=skipped, version=version)
            shard = _read(place, path, version)
        assert shard is not None
        return shard


def _read(place: str, path: Path, version: str) -> _Shard | None:
    """A shard by its index, if there is one of this version."""
    try:
        index = read_index(path)
    except (FileNotFoundError, ValueError):
        return None
    if index.version != version and not (is_url(place) and "" in (version, index.version)):
        return None
    largest = int(index.label.max()) if index.label is not None and len(index.label) else -1
    return _Shard(ShardFile(place, str(path), index.version), index.entry, largest, index.skipped)


def _classes(settings: WebdatasetData, shards: Sequence[_Shard]) -> int | None:
    """The number of classes, at least as many as the labels need."""
    if settings.label is None:
        return None
    last = max(shards, key=lambda shard: shard.largest_label)
    if settings.num_classes is not None and last.largest_label >= settings.num_classes:
        raise ValueError(
            f"{last.file.place} holds the label {last.largest_label}, data.num_classes={settings.num_classes} takes "
            f"labels up to {settings.num_classes - 1}"
        )
    return settings.num_classes or last.largest_label + 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]


def _left_out(skipped: Sequence[Skipped]) -> str:
    shown = "; ".join(f"{name} ({reason})" for name, reason in skipped[:SHOWN])
    return f"{len(skipped)} samples are left out, such as {shown}" if skipped else "They hold none"
