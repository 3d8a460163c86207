"""Members that share a key are one sample, as in webdataset's shards: their images, and the values of their labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from shortcutflow.data.index import Skipped
from shortcutflow.data.sources.labels import NoLabel, choose_field, how_to_choose
from shortcutflow.data.sources.readers import RawItem

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LARGEST_LABEL = 2**20
"""Bytes of a member that holds a label."""

_LOOKED_AT = 64
Read = Callable[[RawItem], bytes]
"""Gives a file's bytes."""


class Sample(NamedTuple):
    """An image and the other members of its key, by extension."""

    image: RawItem
    members: dict[str, RawItem]


def suffix_of(name: str) -> str:
    """In lower case with its dot, or empty."""
    last = name.rpartition("/")[2]
    return "." + last.rpartition(".")[2].lower() if "." in last[1:] else ""


def key_and_extension(name: str) -> tuple[str, str]:
    """As webdataset splits a name: at the first dot of its last part; (name, "") where it sees no sample."""
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    return (name, "") if key is None else (key, extension.lower())


def _kind(extension: str) -> str:
    """What decides how a member is decoded: the last part of its extension."""
    return extension.rpartition(".")[2]


def label_members(files: Iterable[RawItem]) -> set[str]:
    """Which of the extensions ``cls``, ``class``, ``json`` and ``txt`` lie beside images with the same key."""
    images, labels = set(), dict[str, set[str]]()
    for file in files:
        key, extension = key_and_extension(file.name)
        if "." + _kind(extension) in IMAGE_SUFFIXES:
            images.add(key)
        elif _kind(extension) in ("cls", "class", "json", "txt"):
            labels.setdefault(_kind(extension), set()).add(key)
    return {kind for kind, keys in labels.items() if not images.isdisjoint(keys)}


def by_key(files: Iterable[RawItem]) -> tuple[dict[str, dict[str, RawItem]], list[Skipped]]:
    """The members of each key by their extensions, in the order of the files; and those that are part of no sample."""
    samples: dict[str, dict[str, RawItem]] = {}
    skipped = []
    for file in files:
        key, extension = key_and_extension(file.name)
        if not extension or not key.rpartition("/")[2]:
            skipped.append(Skipped(file.name, "not an image: suffix (none)"))
        elif extension in (members := samples.setdefault(key, {})):
            skipped.append(Skipped(file.name, "a member of this name comes before it, which is used"))
        else:
            members[extension] = file
    return samples, skipped


def samples_of(files: Iterable[RawItem]) -> tuple[list[Sample], list[Skipped]]:
    """Samples in the order of their names, and what is part of none."""
    found, skipped = by_key(sorted(files))
    samples = []
    for members in found.values():
        image, left_out = _image_of(members)
        skipped += left_out
        if image is not None:
            samples.append(Sample(image, members))
    return samples, skipped


def _image_of(members: dict[str, RawItem]) -> tuple[RawItem | None, list[Skipped]]:
    """The one image of a sample: the one whose extension is plain (``jpg``), or the only one."""
    images = {extension: file for extension, file in members.items() if "." + _kind(extension) in IMAGE_SUFFIXES}
    if not images:
        reason = f"a sample without an image, it has {', '.join(sorted(members))}"
        return None, [Skipped(min(members.values()).name, reason)]
    plain = [extension for extension in images if "." not in extension]
    if not plain and len(images) > 1:
        reason = (
            f"one of {len(images)} images of one sample, whose key ends at the first dot of a name, and none is "
            "plainly called KEY.jpg"
        )
        return None, [Skipped(file.name, reason) for file in images.values()]
    chosen = images[min(plain) if plain else next(iter(images))]
    reason = "a further image of a sample, of which one is used"
    return chosen, [Skipped(file.name, reason) for file in images.values() if file is not chosen]


def label_field(samples: list[Sample], read: Read, where: str) -> str | None:
    """What holds the labels: ``cls``, ``class``, ``json:FIELD``, ``txt`` if it is numbers, or None.

    Raises:
        ValueError: if several fields may.
    """
    for kind in ("cls", "class"):
        if any(_member(sample.members, kind) for sample in samples):
            return kind
    if (field := json_field(samples, read, where)) is not None:
        return field
    texts = [file for sample in samples if (file := _member(sample.members, "txt"))][:_LOOKED_AT]
    numbers = texts and all(_text(read(file)[:LARGEST_LABEL]).removeprefix("-").isdecimal() for file in texts)
    return "txt" if numbers else None


def json_field(samples: list[Sample], read: Read, where: str, *, must: bool = False) -> str | None:
    """The field of ``KEY.json`` that holds the label, as ``json:FIELD``.

    Raises:
        ValueError: if several may; if none does and it ``must``.
    """
    files = [file for sample in samples if (file := _member(sample.members, "json"))][:_LOOKED_AT]
    fields = {str(field) for file in files if isinstance(found := _json(read(file)), dict) for field in found}
    field = choose_field(fields, f"KEY.json in {where}", "json:")
    if field is None and must:
        listed = ", ".join(sorted(fields)[:20]) or "none"
        choose = how_to_choose("json:FIELD", "none")
        raise ValueError(f"no field of KEY.json in {where} is called label (fields: {listed}): {choose}")
    return None if field is None else f"json:{field}"


def label_value(members: Mapping[str, RawItem], field: str, read: Read) -> object:
    """What a field (see :func:`label_field`) holds for a sample; None, or a ``NoLabel``, where there is none."""
    kind, _, path = field.partition(":")
    file = _member(members, kind.lower())
    if file is None:
        return None
    content = read(file)
    if len(content) > LARGEST_LABEL:
        return NoLabel(f"its label has {len(content)} bytes or more, at most {LARGEST_LABEL} are read")
    if kind != "json":
        return _text(content)
    found = _json(content)
    if found is None:
        return NoLabel("its .json is not readable")
    for part in [path] if isinstance(found, dict) and path in found else path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _member(members: Mapping[str, RawItem], kind: str) -> RawItem | None:
    if kind in members:
        return members[kind]
    found = [file for extension, file in members.items() if _kind(extension) == kind]
    return found[0] if len(found) == 1 else None


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig", errors="replace").strip()


def _json(content: bytes) -> object:
    try:
        return json.loads(content) if len(content) <= LARGEST_LABEL else None
    except (ValueError, RecursionError):
        return None
