"""Raw pictures to shards: ``shortcutflow prepare``."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shortcutflow.data.images import Crop, ImageError, ImageFormat, encode_image, read_image, to_square
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.preparation import (
    SKIPPED,
    Preparation,
    begin,
    check_place,
    complete,
    cut,
    entries_of,
    finish,
    finished_shard,
    only_one,
    shuffled_order,
    skipped_of,
    versions_of,
)
from shortcutflow.data.shard_workers import ShardTask, write_tasks
from shortcutflow.data.shards import EncodedSample, Skipped, WrittenShard, shard_name
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.labels import LabelChoice
from shortcutflow.data.sources.readers import RawItem, RawSource, Reader
from shortcutflow.distributed import cores

LOSSLESS_UP_TO = 64
"""Largest side in pixels that is stored as PNG by default: there it is small, and JPEG's 8x8 blocks are large."""

CROPS_IN_WORDS = {
    "released": "middle square, bilinear antialiased resizing",
    "adm": "ADM's centre crop: boxes, bicubic to the short side, middle square",
    "stretch": "bicubic antialiased resizing of both sides, no crop",
    "none": "taken as they are",
}


class PrepareOptions(BaseModel):
    """What decides about the content of the shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1, le=4096, description="side in pixels")
    crop: Crop = "released"
    format: ImageFormat
    quality: int = Field(default=95, ge=1, le=100)
    labels: LabelChoice = Field(default=True, description="true: those that are there; false: none; or which")
    seed: int = Field(default=0, description="of the one shuffling before the cut into shards")
    samples_per_shard: int = Field(default=4096, ge=1)


class Numbered(NamedTuple):
    """An item and its place in the sorted source, which makes its key unique."""

    number: int
    item: RawItem


@dataclass(frozen=True)
class EncodePictures:
    """Makes the samples of a shard; it travels to the worker processes."""

    reader: Reader
    options: PrepareOptions
    strict: bool

    def __call__(self, work: Sequence[Numbered]) -> Iterator[EncodedSample | Skipped]:
        for number, item in work:
            try:
                content = self._encoded(item)
            except ImageError as error:
                if self.strict:
                    raise ValueError(f"{item.name}: {error}") from error
                yield Skipped(item.name, str(error))
                continue
            label = item.label if self.options.labels else None
            yield EncodedSample(key_of(number, item.name), content, self.options.format, label, name=item.name)

    def _encoded(self, item: RawItem) -> bytes:
        image = to_square(read_image(self.reader.read(item)), self.options.size, self.options.crop)
        return encode_image(image, self.options.format, self.options.quality)


def key_of(number: int, name: str) -> str:
    """A sample's key: its number in the sorted source, and what a person may recognise of its name."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return f"{number:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:48]}"


def prepare(
    source: Path,
    folder: Path,
    *,
    size: int,
    crop: Crop = "released",
    format: ImageFormat | None = None,
    quality: int = 95,
    labels: bool | str = True,
    seed: int = 0,
    samples_per_shard: int = 4096,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write the pictures of a source as shards that training streams from.

    The same call continues after any stop, even of power, and gives the same bytes as an uninterrupted one with any
    number of workers. A folder that is complete is returned as it is, if it was made of the same source and options.

    Args:
        source: raw pictures, see :mod:`shortcutflow.data.sources`.
        folder: for the shards; new, or of an earlier call with the same options.
        size: side of the square pictures, in pixels.
        crop: see :func:`~shortcutflow.data.images.to_square`.
        format: None stores PNG up to 64 pixels, where it is small and JPEG would be seen, JPEG above.
        quality: of JPEG and WebP, 1 ... 100.
        labels: which, see :data:`~shortcutflow.data.sources.labels.LabelChoice`; False for none.
        seed: of the order.
        samples_per_shard: items each shard is made of.
        workers: processes; None for all cores.
        strict: raise at the first item that gives no sample, instead of listing it in ``skipped.txt``.
        progress: show a progress bar and what happens, on standard error.

    Raises:
        FileNotFoundError, ValueError: for a source, options or folder that do not fit, saying what does.
        OSError: if reading or writing fails, such as on a full disk; then too the same call continues.
    """
    options = checked_options(
        size=size, crop=crop, format=format or default_format(size), quality=quality, labels=labels, seed=seed,
        samples_per_shard=samples_per_shard,
    )  # fmt: skip
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    check_place(folder, source)
    raw = open_source(source, labels=options.labels)
    if strict and raw.skipped:
        raise ValueError(f"{raw.skipped[0].name}: {raw.skipped[0].reason}")
    fingerprint = raw.fingerprint()
    if (done := complete(folder, options.model_dump(), fingerprint, strict=strict)) is not None:
        return done
    with only_one(folder, say=progress):
        if (done := complete(folder, options.model_dump(), fingerprint, strict=strict)) is not None:
            return done
        try:
            return _prepare(raw, source, folder, options, workers or cores(), strict, progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, f"no space left for {folder}: free some, the same call continues") from error
            raise


def checked_options(**options: Any) -> PrepareOptions:
    """Options, or one sentence about the first that is wrong.

    Raises:
        ValueError: naming option, value and what is allowed.
    """
    try:
        return PrepareOptions(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{name} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def default_format(size: int) -> Literal["png", "jpg"]:
    """How pictures of a size are stored unless told otherwise."""
    return "png" if size <= LOSSLESS_UP_TO else "jpg"


def _prepare(
    source: RawSource, path: Path, folder: Path, options: PrepareOptions, workers: int, strict: bool, progress: bool
) -> Manifest:
    if progress:
        source.print_notes()
    fingerprint = source.fingerprint()
    versions = versions_of("shortcutflow", "pillow")
    begin(
        folder,
        Preparation(options=options.model_dump(), source=fingerprint, path=str(path.resolve()), versions=versions),
    )
    shards = _write_missing(source, folder, options, workers, strict, progress)
    skipped = skipped_of(source.skipped, shards)
    names = source.class_names if options.labels else ()
    manifest = Manifest(
        shape=(3, options.size, options.size), format=options.format,
        num_classes=len(names) or None, class_names=names,
        preprocessing=in_words(options),
        settings=options.model_dump() | {"source": fingerprint, "skipped": len(skipped)} | versions,
        shards=entries_of(path, shards, skipped),
    )  # fmt: skip
    return finish(folder, manifest, skipped)


def _write_missing(
    source: RawSource, folder: Path, options: PrepareOptions, workers: int, strict: bool, progress: bool
) -> list[WrittenShard]:
    """All shards in order: those that are there, and those written now."""
    plan = cut(shuffled_order(source, options.seed), options.samples_per_shard)
    shards = {number: shard for number in range(len(plan)) if (shard := finished_shard(folder, number)) is not None}
    if strict:
        _refuse_skipped(shards.values())
    missing = [number for number in range(len(plan)) if number not in shards]
    tasks = [
        ShardTask(folder / shard_name(number), [Numbered(i, source.items[i]) for i in plan[number]], len(plan[number]))
        for number in missing
    ]
    done = sum(len(plan[number]) for number in shards)
    encode = EncodePictures(source.reader, options, strict)
    written = write_tasks(tasks, encode, workers=workers, done=done, progress=progress)
    shards |= dict(zip(missing, written, strict=True))
    return [shards[number] for number in range(len(plan))]


def _refuse_skipped(shards: Iterable[WrittenShard]) -> None:
    """A call without ``strict`` may have passed over items before."""
    for shard in shards:
        for name, reason in shard.skipped:
            raise ValueError(f"{name}: {reason}")


def in_words(options: PrepareOptions) -> str:
    """The preprocessing, for a reader of the manifest."""
    stored = options.format + ("" if options.format == "png" else f" of quality {options.quality}")
    return f"{CROPS_IN_WORDS[options.crop]}; {options.size}x{options.size} RGB, {stored}"


def summary(manifest: Manifest, folder: Path) -> str:
    """What a preparation gave, and the next command, for people."""
    skipped = manifest.settings.get("skipped", 0)
    classes = f"{manifest.num_classes} classes" if manifest.num_classes is not None else "no labels"
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    lines = [
        f"{folder}: {manifest.samples} samples, {classes}, {len(manifest.shards)} shards, {size:.1f} MB",
        f"skipped: {skipped}" + (f", listed in {folder / SKIPPED}" if skipped else ""),
        f"train on it: shortcutflow train RECIPE data.kind=shards data.folder={folder}",
    ]
    return "\n".join(lines)
