"""Webdataset shards as a raw source: members that share a key are one sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from shortcutflow.data.images import ImageError
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.raw_archives import Listed
from shortcutflow.data.raw_items import RangeReader, RawItem
from shortcutflow.data.shards import Skipped

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LARGEST_LABEL = 2**20
"""Bytes of a member that holds a label."""

MOST_CLASSES = 1_000_000


def suffix_of(name: str) -> str:
    """In lower case with its dot, or empty."""
    last = name.rpartition("/")[2]
    return "." + last.rpartition(".")[2].lower() if "." in last[1:] else ""


def _key_and_extension(name: str) -> tuple[str, str]:
    """As webdataset splits a name: at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def is_webdataset(files: Iterable[Listed]) -> bool:
    """Whether some picture has a label beside it."""
    pictures, labels = set(), set()
    for file in files:
        key, extension = _key_and_extension(file.name)
        if "." + extension in IMAGE_SUFFIXES:
            pictures.add(key)
        elif extension in ("cls", "json"):
            labels.add(key)
    return not pictures.isdisjoint(labels)


def webdataset_items(
    files: Iterable[Listed], reader: RangeReader, folder: Path
) -> tuple[list[RawItem], tuple[str, ...], list[Skipped]]:
    """Items in the order of their names, class names, and samples whose label cannot be read.

    A label is ``KEY.cls`` or the number ``label`` in ``KEY.json``. Class names come from a ``manifest.json`` of ours,
    and are numbers without one.
    """
    samples: dict[str, dict[str, Listed]] = {}
    for file in sorted(files):
        key, extension = _key_and_extension(file.name)
        samples.setdefault(key, {}).setdefault(extension, file)
    items, skipped = [], []
    for members in samples.values():
        picture = next((file for extension, file in members.items() if "." + extension in IMAGE_SUFFIXES), None)
        if picture is None:
            continue
        try:
            items.append(RawItem(picture.name, _label(members, reader), picture.place))
        except ImageError as error:
            skipped.append(Skipped(picture.name, str(error)))
    labels = [item.label for item in items if item.label is not None]
    if not labels:
        return items, (), skipped
    skipped += [Skipped(item.name, "it has no label, others have") for item in items if item.label is None]
    items = [item for item in items if item.label is not None]
    return items, _names(folder, max(labels) + 1), skipped


def _label(members: dict[str, Listed], reader: RangeReader) -> int | None:
    """From the members of a sample; None if there is none.

    Raises:
        ImageError: if there is one that is no label.
    """
    label: object = None
    if "cls" in members:
        text = _content(members["cls"], reader).decode("ascii", errors="replace").strip()
        label = int(text) if text.isdecimal() and len(text) <= 9 else text[:20]
    elif "json" in members:
        try:
            found = json.loads(_content(members["json"], reader))
        except (ValueError, RecursionError) as error:
            raise ImageError("its .json is not readable") from error
        label = found.get("label") if isinstance(found, dict) else None
    if label is None or (isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_CLASSES):
        return label
    raise ImageError(f"its label is {str(label)[:40]!r}, not a number from 0 to {MOST_CLASSES - 1}")


def _content(file: Listed, reader: RangeReader) -> bytes:
    number, offset, size = (int(value) for value in file.place)
    if size > LARGEST_LABEL:
        raise ImageError(f"its label has {size} bytes, at most {LARGEST_LABEL} are read")
    return reader.part(number, offset, size)


def _names(folder: Path, least: int) -> tuple[str, ...]:
    manifest = folder / MANIFEST
    try:
        names = Manifest.parse(manifest.read_bytes(), str(manifest)).class_names if manifest.is_file() else ()
    except ValueError:
        names = ()  # somebody else's manifest
    return names if len(names) >= least else tuple(str(label) for label in range(least))
