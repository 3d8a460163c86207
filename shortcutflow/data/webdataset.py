"""Anybody's webdataset shards as a run's data, read where they lie.

Each shard's headers are read once, into an index of the kind that prepared shards have; then the same reader and stream
take both, so the order, the equal batches and the resume by one number are the same. Members go together by
webdataset's own rule. Its decoders are not used: some of them run code that a shard brings along.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from tqdm import tqdm

from shortcutflow.data.images import Crop
from shortcutflow.data.index import LARGEST_SAMPLE, Extent, Index, IndexBuilder, read_index, write_index
from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.data.ranks import Rank
from shortcutflow.data.remote import COMMANDS, ShardFolder, download, version_of, with_retries
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.data.sources import braced
from shortcutflow.data.sources.archives import compression_of, tar_members
from shortcutflow.data.sources.labels import MOST_CLASSES
from shortcutflow.data.sources.webdataset import LARGEST_LABEL, key_and_extension
from shortcutflow.io.atomic import locked, sync, unfinished_name, write_whole

SCHEMES = (*COMMANDS, "hf")
SCAN_THREADS = 8
SHOWN = 5
"""Left-out samples that are printed; the list has all."""
_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset passes over."""
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
    if missing := [place for place in places if not _is_url(place) and not os.path.isfile(place)]:
        raise FileNotFoundError(f"data.urls names {missing[0]}, which is not there ({len(missing)} are missing)")
    return _opened(only, tuple(places), tuple(_version(place) for place in places if not _is_url(place)))


@lru_cache(maxsize=4)
def _opened(settings: WebdatasetData, places: tuple[str, ...], versions: tuple[str, ...]) -> WebdatasetShards:
    return WebdatasetShards(settings, places)


def expand(urls: str | tuple[str, ...]) -> list[str]:
    """The shards that URLs with braces, or list files, stand for.

    Raises:
        ValueError: for URLs of another kind, and if there are none, or one comes twice.
    """
    places: list[str] = []
    for url in (urls,) if isinstance(urls, str) else urls:
        if not _is_url(url) and not url.endswith(".tar") and Path(url).is_file():
            lines = [line.strip() for line in Path(url).read_text(encoding="utf-8").splitlines()]
            found = [place for line in lines if line and not line.startswith("#") for place in braced(line)]
            # Relative to the list, so that both can be moved together.
            places += [place if _is_url(place) else str(Path(url).parent / place) for place in found]
        else:
            places += braced(url)
    for place in places:
        if (_is_url(place) and place.partition("://")[0] not in SCHEMES) or re.match(r"[a-z]{2,}:(?!//)", place):
            raise ValueError(
                f"{place}: shards are local files or have a URL of {', '.join(SCHEMES)}; no command is run"
            )
    if not places:
        raise ValueError(f"data.urls={urls!r} names no shard")
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise ValueError(f"data.urls names {twice[0]} twice, and {len(twice) - 1} more")
    return places


def _is_url(place: str) -> bool:
    return "://" in place


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
        self.url = next((place for place in places if _is_url(place)), None)
        self.path, self.crop = settings.cache / "webdataset", settings.crop
        self._name = settings.urls if isinstance(settings.urls, str) else ", ".join(settings.urls)
        self._limit, self._ahead, self._pool = settings.cache_limit, {}, None
        self._fields = Fields.of(settings)
        self.path.mkdir(parents=True, exist_ok=True)
        found = self._indexed(places)
        self.skipped = tuple(item for shard in found for item in shard.skipped)
        usable = [shard for shard in found if shard.entry is not None]
        if self.skipped:
            self._list_skipped(settings)
        if not usable:
            raise ValueError(f"data.urls={settings.urls!r}: no sample can be used. {_left_out(self.skipped)}")
        entries = tuple(shard.entry for shard in usable if shard.entry is not None)
        self._shards = {entry.name: shard for entry, shard in zip(entries, usable, strict=True)}
        self.manifest = Manifest(
            shape=(3, settings.size, settings.size), format="jpg", num_classes=_classes(settings, usable),
            preprocessing=f"webdataset shards; crop {settings.crop} when they are read", shards=entries,
        )  # fmt: skip

    def __str__(self) -> str:
        return self._name

    def url_of_file(self, name: str) -> str:
        """The URL of a remote shard."""
        return self._shards[name].place

    def path_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard, fetched if it is not there yet."""
        place = self._shards[entry.name].place
        return super().path_of(entry) if _is_url(place) else Path(place)

    def open(self, entry: ShardEntry) -> int:
        """A descriptor of a shard's file, which must still be the one that was indexed."""
        shard = self._shards[entry.name]
        if _is_url(shard.place):
            return super().open(entry)
        file = os.open(shard.place, os.O_RDONLY)
        if _version(file) != shard.version:
            os.close(file)
            raise ValueError(f"{shard.place} has changed since it was indexed: start again, which indexes it anew")
        return file

    def index_of(self, entry: ShardEntry) -> Path:
        """The local file of a shard's index."""
        return self._shards[entry.name].index_path

    def fetch_ahead(self, entries: list[ShardEntry]) -> None:
        """Begin to fetch those of them that are remote."""
        super().fetch_ahead([entry for entry in entries if _is_url(self._shards[entry.name].place)])

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
        version = version_of(place) if _is_url(place) else _version(place)
        where = place if _is_url(place) else os.path.abspath(place)
        stem = _PLAIN.sub("_", Path(place).name.removesuffix(".tar")).lstrip(".-")[:100]
        name = f"{stem or 'shard'}-{hashlib.sha256(where.encode(errors='replace')).hexdigest()[:8]}.tar"
        paths = [self.path / f"{name}.{self._fields.digest}.index"]
        if not _is_url(place):
            paths.insert(0, Path(f"{place}.shortcutflow-{self._fields.digest}.index"))
        if (shard := _found(place, paths, version)) is not None:
            return shard
        with locked(self.path / f".{paths[-1].name}.lock"):
            if (shard := _found(place, paths, version)) is not None:  # another process has written it meanwhile
                return shard
            if _is_url(place):
                return with_retries(lambda: self._fetch_and_index(place, name, paths, version), place)
            builder, skipped = scan(Path(place), self._fields)
            sha256 = hashlib.sha256(version.encode()).hexdigest()  # the file is not read through
            return _written(place, paths, version, builder, skipped, ShardEntry.model_construct(
                name=name, samples=builder.samples, bytes=os.path.getsize(place), sha256=sha256, index_sha256="0" * 64
            ))  # fmt: skip

    def _fetch_and_index(self, place: str, name: str, paths: list[Path], version: str) -> _Shard:
        unfinished = unfinished_name(self.path / name)
        try:
            sha256, size = download(place, unfinished)
            builder, skipped = scan(unfinished, self._fields)
            sync(unfinished)
            kept = self._kept_at(name, sha256)
            unfinished.replace(kept)
        finally:
            unfinished.unlink(missing_ok=True)
        self._make_room(keep=kept)
        return _written(place, paths, version, builder, skipped, ShardEntry.model_construct(
            name=name, samples=builder.samples, bytes=size, sha256=sha256, index_sha256="0" * 64
        ))  # fmt: skip

    def _list_skipped(self, settings: WebdatasetData) -> None:
        """Print how many samples are left out and where they are listed."""
        content = "".join(f"{' '.join(name.split())}\t{reason}\n" for name, reason in self.skipped)
        digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
        path = self.path / f"left-out-{digest}.txt"
        write_whole(path, content)
        if Rank.from_environment().number == 0:
            print(f"{_left_out(self.skipped)}; all are listed in {path}", file=sys.stderr)


def _version(file: str | int) -> str:
    """What a local file is recognised by: its size and time of change."""
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}"


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
        if index.version == version or (_is_url(place) and "" in (version, index.version)):
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


class Fields(NamedTuple):
    """Which members of a sample are its image and its label.

    Attributes:
        image: extensions, the first that there is counts.
        label: extension, or None.
        path: keys that lead to the label in a JSON member; empty for a member that holds a number.
        digest: of these, for the names of indexes.
    """

    image: tuple[str, ...]
    label: str | None
    path: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, settings: WebdatasetData) -> Fields:
        """What the settings say; ``EXTENSION:path.to.label`` is for a member of JSON."""
        image = tuple(settings.image.lower().split(";"))
        label, _, path = (settings.label or "").partition(":")
        keys = tuple(path.split(".")) if path else ()
        digest = hashlib.sha256(json.dumps([1, image, label, keys]).encode()).hexdigest()[:8]
        return cls(image, label.lower() or None, keys, digest)


def scan(path: Path, fields: Fields) -> tuple[IndexBuilder, list[tuple[str, str]]]:
    """Read a shard's headers and labels: its samples in their order, and (name, reason) of what is none.

    Members with the same key are one sample, wherever in the shard they lie. What follows damage is left out.

    Raises:
        ValueError: if it is compressed, so that samples cannot be read in any order.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: list[tuple[str, str]] = []
    builder = IndexBuilder()
    with path.open("rb") as file:
        if (compression := compression_of(file.read(8))) is not None:
            raise ValueError(f"{path} is compressed by {compression}: decompress it to a plain .tar")
        try:
            for member in tar_members(file, 0, os.fstat(file.fileno()).st_size, path.name):
                key, extension = key_and_extension(member.name)
                if not extension or _META.match(member.name) or not member.isreg() or member.issparse():
                    continue
                members = samples.setdefault(key, {})
                if extension in members:
                    skipped.append((member.name, "a member of this name comes before it, which is used"))
                else:
                    members[extension] = member.offset_data, member.size
        except ValueError as error:
            skipped.append((path.name, f"{error}; {len(samples)} samples before that are used"))
        for key, members in samples.items():
            try:
                image = _image(members, fields)
                label = _label(file.fileno(), members, fields)
            except ValueError as error:
                skipped.append((key, str(error)))
            else:
                builder.add([image], label, None, key)
    return builder, skipped


def _image(members: dict[str, tuple[int, int]], fields: Fields) -> Extent:
    extension = next((extension for extension in fields.image if extension in members), None)
    if extension is None:
        raise ValueError(f"no image ({';'.join(fields.image)}) among its members: {', '.join(members)}"[:200])
    offset, size = members[extension]
    if size > LARGEST_SAMPLE:
        raise ValueError(f"its image has {size} bytes, at most {LARGEST_SAMPLE} are read")
    return Extent(offset, size, -1)


def _label(file: int, members: dict[str, tuple[int, int]], fields: Fields) -> int | None:
    if fields.label is None:
        return None
    if fields.label not in members:
        raise ValueError(f"no label ({fields.label}) among its members: {', '.join(members)}"[:200])
    offset, size = members[fields.label]
    if size > LARGEST_LABEL:
        raise ValueError(f"its label has {size} bytes, at most {LARGEST_LABEL} are read")
    content = os.pread(file, size, offset)
    label: object
    if fields.path:
        try:
            label = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .{fields.label} is not readable JSON") from error
        for key in fields.path:
            label = label.get(key) if isinstance(label, dict) else None
    else:
        text = content.decode("ascii", errors="replace").strip()
        label = int(text) if text.isdecimal() and len(text) <= 9 else text
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < MOST_CLASSES:
        raise ValueError(f"its label is {str(label)[:40]!r}, not a number from 0 to {MOST_CLASSES - 1}")
    return label
