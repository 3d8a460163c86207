"""What every preparation of shards shares: which items form which shard, going on after a stop, and the end.

A shard depends on (source, options, number of the shard) alone. So whoever is stopped at any moment, however hard, goes
on with the same call, and the folder gets the same bytes as without the stop.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from shortcutflow.data.manifest import MANIFEST, Manifest, ShardEntry
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Skipped, WrittenShard, shard_name, written_shard
from shortcutflow.data.sources.parquet import CACHE
from shortcutflow.data.sources.readers import RawSource
from shortcutflow.io.atomic import locked, remove_leftovers, write_whole

PREPARATION, SKIPPED, LOCK = "preparation.json", "skipped.txt", ".lock"


class Preparation(BaseModel):
    """``preparation.json``: what is being made here, written before the first shard.

    Attributes:
        options: that decide about the content of the shards.
        source: fingerprint of the raw data.
        path: where that was; empty in records of older versions.
        versions: of the packages that encode; others may give other bytes for the same picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, JsonValue]
    source: str
    path: str = ""
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Preparation | None:
        """The one of a folder, or None.

        Raises:
            ValueError: if it does not parse.
        """
        path = folder / PREPARATION
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(
                f"{path} is damaged, or not of this library: remove that file, or name another folder"
            ) from error


def versions_of(*packages: str) -> dict[str, str]:
    """The installed versions of these packages, for :class:`Preparation`."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@contextmanager
def only_one(folder: Path, *, say: bool = True) -> Iterator[None]:
    """Hold the folder's lock, which ends with its process, however that ends; another one waits here, and says so."""

    def waiting() -> None:
        if say:
            print(f"another process is preparing {folder}; waiting until it is done", file=sys.stderr)

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, waiting=waiting):
        yield


def check_place(folder: Path, source: Path) -> None:
    """Refuse a folder that is, or lies in, the raw data: listing them again would find the shards.

    Raises:
        ValueError: saying so.
    """
    if folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{folder} lies in the raw data {source}: name a folder outside of it")


def complete(
    folder: Path, options: dict[str, JsonValue], source: str | None = None, *, strict: bool = False
) -> Manifest | None:
    """The manifest of a folder that was made completely with these options; None if there is more to do.

    Args:
        folder: of the shards.
        options: that decide about their content.
        source: fingerprint of the raw data; None does not compare it.
        strict: refuse a folder that was made without some items.

    Raises:
        ValueError: if it was made of another source, with other options or by something else; saying what differs.
    """
    found = Preparation.read(folder)
    if found is None:
        others = (
            sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
        )
        if others:
            raise ValueError(f"{folder} already holds other files ({', '.join(others[:3])}); name an empty folder")
        return None
    _check_same(folder, "options", found.options, options)
    if source is not None:
        _check_source(folder, found, source)
    if not (folder / MANIFEST).is_file():
        return None
    try:
        shards = ShardFolder(folder, cache=folder)
        if shards.wrong_sizes():
            return None
    except (FileNotFoundError, ValueError):
        return None  # something was lost since: that shard is made again
    if strict and (skipped := shards.manifest.settings.get("skipped")):
        raise ValueError(f"{folder} was made without {skipped} items, which {folder / SKIPPED} lists")
    return shards.manifest


def _check_source(folder: Path, found: Preparation, source: str) -> None:
    if found.source != source:
        of = f" ({found.path})" if found.path else ""
        raise ValueError(
            f"{folder} was begun from another source{of}, or files of the source were added, removed or changed since: "
            "remove the folder, or name another"
        )


def begin(folder: Path, preparation: Preparation) -> None:
    """Record what is made, or see that the same was begun here; remove what a dead process left half written.

    To be called under :func:`only_one`.

    Raises:
        ValueError: if something else was begun here, saying what differs.
    """
    found = Preparation.read(folder)
    if found is not None:
        _check_same(folder, "options", found.options, preparation.options)
        _check_source(folder, found, preparation.source)
        _check_same(folder, "versions", found.versions, preparation.versions)
    remove_leftovers(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    if found is None:
        write_whole(folder / PREPARATION, preparation.model_dump_json(indent=2) + "\n")


def _check_same(folder: Path, what: str, found: Mapping[str, object], asked: Mapping[str, object]) -> None:
    names = sorted(name for name in found.keys() | asked.keys() if found.get(name) != asked.get(name))
    if names:
        differing = ", ".join(f"{name} {found.get(name)!r} (now {asked.get(name)!r})" for name in names)
        raise ValueError(
            f"{folder} was begun with other {what}: {differing}. Use the same again, remove the folder, or name another"
        )


def shuffled_order(source: RawSource, seed: int) -> list[int]:
    """All items of a source, shuffled.

    Where items are cheap to read only block by block (row groups of parquet files), blocks are shuffled, and then the
    items among as many blocks as a reader keeps in memory.
    """
    rng = random.Random(seed)
    if not source.blocks:
        order = list(range(len(source.items)))
        rng.shuffle(order)
        return order
    blocks = list(source.blocks)
    rng.shuffle(blocks)
    order, pool, held = [], list[int](), 0
    for block in blocks:
        if pool and held + block.bytes > CACHE:
            rng.shuffle(pool)
            order += pool
            pool, held = [], 0
        pool += range(block.start, block.stop)
        held += block.bytes
    rng.shuffle(pool)
    return order + pool


def cut(order: Sequence[int], samples_per_shard: int) -> list[Sequence[int]]:
    """The items of shard 0, 1, ...; the last may have fewer."""
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    return [order[i : i + samples_per_shard] for i in range(0, len(order), samples_per_shard)]


def finished_shard(folder: Path, number: int) -> WrittenShard | None:
    """A shard that an earlier call has completed; None if there is none, or only a damaged one."""
    path = folder / shard_name(number)
    try:
        return written_shard(path)
    except ValueError:
        path.with_suffix(".index").unlink(missing_ok=True)
        return None


def skipped_of(listed: Sequence[Skipped], shards: Sequence[WrittenShard]) -> list[Skipped]:
    """All skipped items: those that listing the source passed over, then shard by shard."""
    return [*listed, *(item for shard in shards for item in shard.skipped)]


def entries_of(source: Path, shards: Sequence[WrittenShard], skipped: Sequence[Skipped]) -> tuple[ShardEntry, ...]:
    """The entries of the shards that hold samples.

    Raises:
        ValueError: if none does.
    """
    entries = tuple(shard.entry for shard in shards if shard.entry is not None)
    if not entries:
        first = f": {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"none of the {len(skipped)} items of {source} could be used; the first{first}")
    return entries


def finish(folder: Path, manifest: Manifest, skipped: Sequence[Skipped]) -> Manifest:
    """Write the list of skipped items and, last, the manifest, which makes the folder complete."""
    if skipped:
        lines = (f"{_one_line(item.name)}\t{_one_line(item.reason)}\n" for item in skipped)
        write_whole(folder / SKIPPED, "".join(lines))
    else:
        (folder / SKIPPED).unlink(missing_ok=True)
    remove_leftovers(folder, of_all=True)
    manifest.write(folder)
    return manifest


def _one_line(text: str) -> str:
    return " ".join(text.split())
