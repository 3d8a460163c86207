"""What webdataset shards hold: their files, named by braces or lists, and in each the members of every sample."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shortcutflow.data.index import LARGEST_SAMPLE, Extent, IndexBuilder
from shortcutflow.data.remote import SCHEMES
from shortcutflow.data.sources import braced
from shortcutflow.data.sources.archives import Listed, compression_of, tar_members
from shortcutflow.data.sources.labels import NoLabel, plain_label
from shortcutflow.data.sources.webdataset import key_and_extension, label_value

_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset passes over."""


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


class Fields(NamedTuple):
    """Which members of a sample are its image and its label.

    Attributes:
        image: extensions, the first that there is counts.
        label: extension, or None.
        path: keys with dots between that lead to the label in a JSON member; empty for a member that holds a number.
        digest: of these, for the names of indexes.
    """

    image: tuple[str, ...]
    label: str | None
    path: str
    digest: str

    @classmethod
    def of(cls, image: str, label: str | None) -> Fields:
        """From ``jpg;png`` and ``cls``, ``json:path.to.label`` or None."""
        extensions = tuple(image.lower().split(";"))
        kind, _, path = (label or "").partition(":")
        digest = hashlib.sha256(json.dumps([1, extensions, kind, path]).encode()).hexdigest()[:8]
        return cls(extensions, kind.lower() or None, path, digest)


def scan(file: BinaryIO, name: str, fields: Fields) -> tuple[IndexBuilder, list[tuple[str, str]]]:
    """Read a shard's headers and labels: its samples in their order, and (name, reason) of what is none.

    Members with the same key are one sample, wherever in the shard they lie. What follows damage is left out.

    Raises:
        ValueError: if it is compressed, so that samples cannot be read in any order.
    """
    samples: dict[str, dict[str, Listed]] = {}
    skipped: list[tuple[str, str]] = []
    builder = IndexBuilder()
    if (compression := compression_of(file.read(8))) is not None:
        raise ValueError(f"{name} is compressed by {compression}: decompress it to a plain .tar")
    try:
        for member in tar_members(file, 0, os.fstat(file.fileno()).st_size, name):
            key, extension = key_and_extension(member.name)
            if not extension or _META.match(member.name) or not member.isreg() or member.issparse():
                continue
            members = samples.setdefault(key, {})
            if extension in members:
                skipped.append((member.name, "a member of this name comes before it, which is used"))
            else:
                members[extension] = Listed(member.name, (member.offset_data, member.size))
    except ValueError as error:
        skipped.append((name, f"{error}; {len(samples)} samples before that are used"))
    for key, members in samples.items():
        try:
            image = _image(members, fields)
            label = _label(file.fileno(), members, fields)
        except ValueError as error:
            skipped.append((key, str(error)))
        else:
            builder.add([image], label, None, key)
    return builder, skipped


def _image(members: dict[str, Listed], fields: Fields) -> Extent:
    extension = next((extension for extension in fields.image if extension in members), None)
    if extension is None:
        raise ValueError(f"no image ({';'.join(fields.image)}) among its members: {', '.join(members)}"[:200])
    offset, size = (int(value) for value in members[extension].place)
    if size > LARGEST_SAMPLE:
        raise ValueError(f"its image has {size} bytes, at most {LARGEST_SAMPLE} are read")
    return Extent(offset, size, -1)


def _label(file: int, members: dict[str, Listed], fields: Fields) -> int | None:
    if fields.label is None:
        return None

    def read(member: Listed) -> bytes:
        offset, size = (int(value) for value in member.place)
        return os.pread(file, size, offset)

    value = label_value(members, fields.label, fields.path, read)
    if value is None:
        where = f"{fields.label}:{fields.path}".rstrip(":")
        raise ValueError(f"no label ({where}) among its members: {', '.join(members)}"[:200])
    label = plain_label(value)
    if isinstance(label, str):
        raise ValueError(f"its label is {label[:40]!r}, not a number")
    if isinstance(label, NoLabel):
        raise ValueError(label.reason)
    return label
