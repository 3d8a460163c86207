"""Images to shards that training streams from: ``shortcutflow prepare``.

Worker processes read, decode and crop the images; this one encodes them and writes shard after shard. A shard depends
on (source, options, its number) alone, and locks tell which shards other processes are writing. So any number of
processes, of several machines too, may make the same call on one folder, and share its work. After a stop, however
hard, the same call keeps what is finished and ends with the same bytes as without the stop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shortcutflow.data.images import Crop, ImageError, ImageFormat, encode_image, read_image, to_square
from shortcutflow.data.index import Index, Skipped
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.remote import is_url
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import EncodedSample, finished_shard, shard_name, write_shard
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.labels import LabelChoice
from shortcutflow.data.sources.parquet import CACHE
from shortcutflow.data.sources.readers import RawItem, RawSource, Reader
from shortcutflow.data.stream import unchanged
from shortcutflow.distributed import Rank, cores_per_process
from shortcutflow.io.atomic import remove_leftovers, write_whole
from shortcutflow.io.json import wrong_fields

PREPARATION, SKIPPED, LOCK, SHARDS_LOCK = "preparation.json", "skipped.txt", ".lock", ".lock-shards"
LOSSLESS_UP_TO = 64
"""Largest side in pixels that is stored as PNG by default: there it is small, and JPEG's 8x8 blocks are large."""
READ_AT_ONCE = 32
"""Images that a worker process returns together."""
CROPS = {
    "released": "middle square, bilinear antialiased resizing",
    "adm": "ADM's centre crop: boxes, bicubic to the short side, middle square",
    "stretch": "bicubic antialiased resizing of both sides, no crop",
    "none": "taken as they are",
}


class PrepareOptions(BaseModel):
    """What decides about the content of the shards, however they are encoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1, le=4096, description="side in pixels")
    crop: Crop = "released"
    labels: LabelChoice = Field(default=True, description="true: those that are there; false: none; or which")
    encoding: str | None = Field(default=None, description="of names in archives that are not UTF-8, such as gbk")
    seed: int = Field(default=0, description="of the one shuffling before the cut into shards")
    samples_per_shard: int = Field(default=4096, ge=1)

    @classmethod
    def checked(cls, **options: Any) -> Self:
        """The options; raises ValueError in one line for what is wrong with them."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise ValueError(wrong_fields(error)) from error


class ImageOptions(PrepareOptions):
    """The same for images."""

    format: ImageFormat = Field(description="PNG unless given up to 64 pixels, JPEG above")
    quality: int = Field(default=95, ge=1, le=100, description="of JPEG and WebP")

    @model_validator(mode="before")
    @classmethod
    def _format_for_size(cls, given: dict[str, Any]) -> dict[str, Any]:
        small = isinstance(size := given.get("size"), int) and size <= LOSSLESS_UP_TO
        return given | {"format": given.get("format") or ("png" if small else "jpg")}


class Squares(NamedTuple):
    """Some images of a shard, cropped by a worker process.

    Attributes:
        shard: its number.
        items: those that can be used, with their numbers in the source.
        contents: of each, the encoded file or pixels (3, size, size) uint8.
        skipped: the others.
        error: what ended the reading; raised in a worker process, its message would hold a traceback.
    """

    shard: int
    items: list[tuple[int, RawItem]]
    contents: list[Any]
    skipped: list[Skipped]
    error: OSError | None = None


class Encoder(NamedTuple):
    """How cropped images become the samples of shards.

    Attributes:
        options: that decide about their content.
        packages: whose versions do so too.
        manifest: shape, values and format of samples, and the preprocessing in words.
        encode: makes the contents of samples of what the worker processes return, given their names.
        read_at_once: images that come together.
    """

    options: PrepareOptions
    packages: tuple[str, ...]
    manifest: dict[str, Any]
    encode: Callable[[list[Any], list[str]], Iterable[bytes | np.ndarray]]
    read_at_once: int = READ_AT_ONCE


class WorkerDiedError(RuntimeError):
    """A worker process ended without an exception."""


def prepare(
    source: str | Path,
    folder: Path,
    *,
    vae: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
    cache: Path = Path("data/cache"),
    **options: Any,
) -> Manifest:
    """Write the images of a source, or their latents, as shards that training streams from.

    The same call continues after any stop, even of power, and gives the same bytes as an uninterrupted one, with any
    number of processes (latents: on the same kind of device). A folder that is complete is returned as it is, if it was
    made of the same source with the same options.

    Args:
        source: raw images, see :mod:`shortcutflow.data.sources`.
        folder: for the shards; new, or of an earlier call with the same options.
        vae: hub id or folder of an autoencoder whose latents are stored instead of images, see
            :mod:`shortcutflow.data.latents`.
        device: to encode on; None takes a GPU if there is one, and every rank of a machine one of its own.
        workers: processes that read images; 0 reads them in this one; None takes the cores (latents: those to spare).
        strict: raise at the first item that gives no sample, instead of listing it in ``skipped.txt``.
        progress: show a progress bar and what happens, on standard error.
        cache: for the files of a URL, which are kept there.
        options: what decides about the content of the shards: ``size`` and any other of :class:`ImageOptions`, or for
            latents of :class:`~shortcutflow.data.latents.LatentOptions`.

    Raises:
        FileNotFoundError, ValueError: for a source, autoencoder, options or folder that do not fit, saying what does;
            for latents outside the range of float16, naming the image.
        OSError: if reading, writing or downloading fails, such as on a full disk; then too the same call continues.
        WorkerDiedError: if a worker process was killed, such as for want of memory.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if not is_url(source) and folder.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{folder} lies in the raw data {source}: name a folder outside of it")
    rank = Rank.from_environment()
    if vae is None:
        encoder = image_encoder(**options)
    else:
        from shortcutflow.data.latents import latent_encoder

        encoder = latent_encoder(vae, rank.device(device), **options)
    raw = open_source(source, labels=encoder.options.labels, encoding=encoder.options.encoding, cache=cache)
    if strict:
        _refuse(raw.skipped)
    if workers is None:
        workers = max(1, cores_per_process() - (vae is not None))
    try:
        return _Job(raw, str(source), folder, encoder, rank, workers, strict, progress and rank.number == 0).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no space left for {folder}: free some, the same call continues") from error
        raise


def image_encoder(**options: Any) -> Encoder:
    """Images as files of one format, which the worker processes encode; raises ValueError for a wrong option."""
    chosen = ImageOptions.checked(**options)
    stored = chosen.format + ("" if chosen.format == "png" else f" of quality {chosen.quality}")
    words = f"{CROPS[chosen.crop]}; {chosen.size}x{chosen.size} RGB, {stored}"
    manifest = {"shape": (3, chosen.size, chosen.size), "format": chosen.format, "preprocessing": words}
    return Encoder(chosen, ("shortcutflow", "pillow"), manifest, lambda files, names: files)


def absolute(source: str | Path) -> str:
    """A URL as it is, a path from the root on."""
    return str(source if is_url(source) else Path(source).resolve())


class Preparation(BaseModel):
    """``preparation.json``: what is being made in a folder, written before the first shard.

    Attributes:
        options: that decide about the content of the shards.
        source: fingerprint of the raw data.
        path: where that was; empty in records of older versions.
        versions: of the packages that encode; others may give other bytes for the same image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, JsonValue]
    source: str
    path: str = ""
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Preparation | None:
        """The one of a folder, or None; raises ValueError if it does not parse."""
        path = folder / PREPARATION
        try:
            return cls.model_validate_json(path.read_bytes()) if path.is_file() else None
        except ValidationError as error:
            raise ValueError(
                f"{path} is damaged, or not of this library: remove that file, or name another folder"
            ) from error


@dataclass
class _Job:
    """One call of :func:`prepare`."""

    source: RawSource
    path: str
    folder: Path
    encoder: Encoder
    rank: Rank
    workers: int
    strict: bool
    progress: bool

    def __post_init__(self) -> None:
        self.options = self.encoder.options.model_dump()
        self.fingerprint = self.source.fingerprint()
        self.versions = {package: _version(package) for package in self.encoder.packages}
        # The items of each shard; the last may have fewer.
        order, size = shuffled_order(self.source, self.options["seed"]), self.options["samples_per_shard"]
        self.plan = [order[i : i + size] for i in range(0, len(order), size)]

    def run(self) -> Manifest:
        """Write what is missing."""
        if (done := self._complete()) is not None:
            return done
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            if (done := self._complete()) is not None:
                return done
            if (found := Preparation.read(self.folder)) is not None:
                self._require_same("versions", found.versions, self.versions)
            remove_leftovers(self.folder)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            if found is None:
                made = Preparation(
                    options=self.options, source=self.fingerprint, path=absolute(self.path), versions=self.versions
                )
                write_whole(self.folder / PREPARATION, made.model_dump_json(indent=2) + "\n")
        if self.progress:
            self.source.print_notes()
        self._write_missing()
        with FileLock(self.folder / LOCK):
            return self._complete() or self._finish()

    def _complete(self) -> Manifest | None:
        """The manifest if the folder is complete; None if there is more to do.

        Raises:
            ValueError: if it was begun for another source, with other options or by something else.
        """
        found = Preparation.read(self.folder)
        if found is None:
            inside = self.folder.iterdir() if self.folder.is_dir() else ()
            if others := sorted(path.name for path in inside if not path.name.startswith(".")):
                names = ", ".join(others[:3])
                raise ValueError(f"{self.folder} already holds other files ({names}); name an empty folder")
            return None
        self._require_same("options", found.options, self.options)
        if found.source != self.fingerprint:
            of = f" ({found.path})" if found.path else ""
            raise ValueError(
                f"{self.folder} was begun from another source{of}, or files of the source were added, removed or "
                "changed since: remove the folder, or name another"
            )
        try:
            shards = ShardFolder(self.folder)
        except (FileNotFoundError, ValueError):
            return None  # not finished, or a shard was lost since, which is made again
        if shards.wrong_sizes():
            return None
        if self.strict and (skipped := shards.manifest.settings.get("skipped")):
            raise ValueError(f"{self.folder} was made without {skipped} items, which {self.folder / SKIPPED} lists")
        return shards.manifest

    def _require_same(self, what: str, before: Mapping[str, object], now: Mapping[str, object]) -> None:
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if names:
            differing = ", ".join(f"{name} {before.get(name)!r} (now {now.get(name)!r})" for name in names)
            raise ValueError(
                f"{self.folder} was begun with other {what}: {differing}. Use the same again, remove the folder, or "
                "name another"
            )

    def _finish(self) -> Manifest:
        """Write the list of skipped items and, last, the manifest, which makes the folder complete."""
        shards = [shard for number in range(len(self.plan)) if (shard := self._finished(number)) is not None]
        skipped = [*self.source.skipped, *(item for shard in shards for item in shard.skipped)]
        entries = tuple(shard.entry for shard in shards if shard.entry is not None)
        if not entries:
            first = f": {skipped[0].name}: {skipped[0].reason}" if skipped else ""
            raise ValueError(f"none of the {len(skipped)} items of {self.path} could be used; the first{first}")
        names = self.source.class_names
        manifest = Manifest(
            **self.encoder.manifest, num_classes=len(names) or None, class_names=names, shards=entries,
            settings=self.options | {"source": self.fingerprint, "skipped": len(skipped)} | self.versions,
        )  # fmt: skip
        (self.folder / SKIPPED).unlink(missing_ok=True)
        if skipped:
            lines = ("\t".join(" ".join(text.split()) for text in item) + "\n" for item in skipped)
            write_whole(self.folder / SKIPPED, "".join(lines))
        remove_leftovers(self.folder, of_all=True)
        manifest.write(self.folder)
        return manifest

    def _finished(self, number: int) -> Index | None:
        """The index of a shard that is complete; None if there is none, or a damaged one."""
        try:
            shard = finished_shard(self.folder / shard_name(number))
        except ValueError:
            return None
        if self.strict and shard is not None:
            _refuse(shard.skipped)  # a call without ``strict`` has passed over these
        return shard

    def _write_missing(self) -> None:
        """Write all shards that are missing, except those that other processes finish meanwhile."""
        count = len(self.plan)
        begin = count * self.rank.number // self.rank.world_size  # each process elsewhere
        missing = [*range(begin, count), *range(begin)]
        # On a terminal the bar moves; in a log file a line now and then is enough.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        with (
            tqdm(
                total=len(self.source.items), desc="shards", unit="image", disable=not self.progress,
                mininterval=interval, maxinterval=interval,
            ) as bar,
            (self.folder / SHARDS_LOCK).open("ab") as lock,
        ):  # fmt: skip
            while missing:
                self._write_free(missing, lock.fileno(), bar)
                if (missing := [number for number in missing if self._finished(number) is None]) and self.progress:
                    print(f"another process is writing {shard_name(missing[0])}; waiting for it", file=sys.stderr)
                for number in missing:  # each is written then, or its process has died and it is missing still
                    fcntl.lockf(lock, fcntl.LOCK_EX, 1, number)
                    fcntl.lockf(lock, fcntl.LOCK_UN, 1, number)

    def _write_free(self, missing: Sequence[int], lock: int, bar: tqdm) -> None:
        """Write those of the missing shards that no other process is writing."""
        loader = DataLoader(
            _Reading(self.source.reader, self.encoder.options),
            sampler=self._claimed(missing, lock, bar),
            batch_size=None,
            collate_fn=unchanged,  # each is a batch already
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # not used; without one the loader would draw from the global generator
        )
        try:
            for number, batches in groupby(loader, key=lambda batch: batch.shard):
                write_shard(self.folder / shard_name(number), self._samples(batches, bar))
                fcntl.lockf(lock, fcntl.LOCK_UN, 1, number)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDiedError(
                "a worker process died, perhaps for want of memory: the same command continues, with fewer --workers "
                "it needs less"
            ) from error

    def _samples(self, batches: Iterable[Squares], bar: tqdm) -> Iterator[EncodedSample | Skipped]:
        """Those of one shard; an error in it leaves the shards before it finished."""
        for batch in batches:
            if batch.error is not None:
                raise batch.error
            if self.strict:
                _refuse(batch.skipped)
            yield from batch.skipped
            names = [item.name for _, item in batch.items]
            encoded = self.encoder.encode(batch.contents, names) if names else ()
            for (number, item), content in zip(batch.items, encoded, strict=True):
                stem = re.sub(r"[^A-Za-z0-9_-]", "_", item.name.rpartition("/")[2].rpartition(".")[0])[:48]
                extension = self.encoder.manifest["format"]
                yield EncodedSample(f"{number:08d}-{stem}", content, extension, item.label, name=item.name)
            bar.update(len(batch.items) + len(batch.skipped))

    def _claimed(self, missing: Sequence[int], lock: int, bar: tqdm) -> Iterator[tuple[int, list[tuple[int, RawItem]]]]:
        """The parts of each shard that is missing, still to be read; other processes leave it alone from then on."""
        for number in missing:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):  # the two ways of systems to say that it is held
                continue
            if self._finished(number) is not None:
                fcntl.lockf(lock, fcntl.LOCK_UN, 1, number)
                bar.update(len(self.plan[number]))
                continue
            order, size = self.plan[number], self.encoder.read_at_once
            for start in range(0, len(order), size):
                yield number, [(i, self.source.items[i]) for i in order[start : start + size]]


class _Reading(Dataset[Squares]):
    """Reads and crops images; each worker process has its own handles of the source."""

    def __init__(self, reader: Reader, options: PrepareOptions) -> None:
        self._reader, self._options = reader, options

    def __getitem__(self, part: tuple[int, list[tuple[int, RawItem]]]) -> Squares:
        options, read = self._options, Squares(part[0], [], [], [])
        for number, item in part[1]:
            try:
                image = to_square(read_image(self._reader.read(item)), options.size, options.crop)
                if isinstance(options, ImageOptions):
                    content: Any = encode_image(image, options.format, options.quality)
                else:
                    content = np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0))
            except ImageError as error:
                read.skipped.append(Skipped(item.name, str(error)))
            except OSError as error:
                return read._replace(error=error)
            else:
                read.items.append((number, item))
                read.contents.append(content)
        return read


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _begin_worker(_number: int) -> None:
    """Leave Ctrl-C to the main process, which ends the workers; end at once when it is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _refuse(skipped: Iterable[Skipped]) -> None:
    """Under ``strict``: raise ValueError for the first of them."""
    for name, reason in skipped:
        raise ValueError(f"{name}: {reason}")


def shuffled_order(source: RawSource, seed: int) -> list[int]:
    """All items of a source, shuffled.

    Where items are cheap to read only block by block (row groups of parquet files), blocks are shuffled, and then the
    items among as many blocks as a reader keeps in memory.
    """
    rng = random.Random(seed)
    blocks = list(source.blocks)
    rng.shuffle(blocks)
    order, pool, held = list[int](), [] if blocks else list(range(len(source.items))), 0
    for block in blocks:
        if pool and held + block.bytes > CACHE:
            rng.shuffle(pool)
            order += pool
            pool, held = [], 0
        pool += range(block.start, block.stop)
        held += block.bytes
    rng.shuffle(pool)
    return order + pool


def summary(manifest: Manifest, folder: Path) -> str:
    """What a preparation made, and the next command."""
    skipped = manifest.settings.get("skipped", 0)
    classes = f"{manifest.num_classes} classes" if manifest.num_classes is not None else "no labels"
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    lines = [
        f"{folder}: {manifest.samples} samples, {classes}, {len(manifest.shards)} shards, {size:.1f} MB",
        f"skipped: {skipped}" + (f", listed in {folder / SKIPPED}" if skipped else ""),
        f"train on it: shortcutflow train RECIPE data.kind=shards data.folder={folder}",
    ]
    return "\n".join(lines)
