"""Raw pictures wherever they lie: folders, zip and tar archives, parquet files and shards, told apart by looking.

In folders and archives the first folder below the one that holds everything is the class, whatever lies deeper;
classes are numbered in the order of their names. Pictures that all lie in one folder have no labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shortcutflow.data.raw_archives import (
    Listed,
    Listing,
    clean,
    compression_of,
    is_junk,
    list_folder,
    list_tar,
    list_zip,
)
from shortcutflow.data.raw_items import FolderReader, RangeReader, RawItem, RawSource, Reader, ZipReader
from shortcutflow.data.raw_parquet import open_parquet
from shortcutflow.data.raw_samples import IMAGE_SUFFIXES, is_webdataset, suffix_of, webdataset_items
from shortcutflow.data.shards import Skipped

SPLITS = {"train", "val", "valid", "validation", "test", "dev"}
SUPPORTED = (
    "a folder of pictures or of class folders; a zip or uncompressed tar of either; ImageNet's tar of a tar for each "
    "class; parquet files with a column 'image'; webdataset shards (.tar with KEY.jpg and KEY.cls)"
)
_SHARD_NUMBER = re.compile(r"(^|[-_.])\d+$")


def open_source(path: Path, *, labels: bool = True) -> RawSource:
    """List the pictures of a source, without reading them.

    Args:
        path: a folder or a file; or a folder inside an archive, as in ``imagenet.zip/train``.
        labels: False takes no class from anywhere, so that pictures may lie at any depth.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is none of the supported kinds, saying what was found; or damaged; or ambiguous.
    """
    archive = next((place for place in (path, *path.parents) if place.is_file()), None)
    if archive is not None:
        source = _open_file(archive, path.relative_to(archive).as_posix(), path, labels)
    elif path.is_dir():
        source = _open_folder(path, labels)
    else:
        raise FileNotFoundError(f"there is no {path}")
    if labels or not source.class_names:
        return source
    return replace(source, items=[item._replace(label=None) for item in source.items], class_names=())


def _open_file(archive: Path, inside: str, path: Path, labels: bool) -> RawSource:
    with archive.open("rb") as file:
        head = file.read(512)
    if (compression := compression_of(head)) is not None:
        raise ValueError(
            f"{archive} is compressed by {compression}: its members cannot be read in any order. Unpack it, or only "
            "decompress it to a plain .tar"
        )
    if head.startswith(b"PAR1"):
        return open_parquet([archive])
    if head.startswith(b"PK"):
        listing = _inside(list_zip(archive), inside, path)
        return _classified("a zip archive", ZipReader(archive), listing, path, labels)
    if head[257:262] == b"ustar" or archive.suffix == ".tar":
        listing = _inside(list_tar(archive), inside, path)
        return _of_tars([archive], listing.files, listing.skipped, path, labels)
    raise ValueError(f"{archive} is no source of pictures ({len(head)} bytes looked at). Supported: {SUPPORTED}")


def _inside(listing: Listing, folder: str, path: Path) -> Listing:
    """What lies in one folder of an archive."""
    if folder == ".":
        return listing
    found = Listing(
        [file for file in listing.files if file.name.startswith(folder + "/")],
        [item for item in listing.skipped if item.name.startswith(folder + "/")],
    )
    if not found.files:
        raise FileNotFoundError(f"there is no {path}: the archive holds no files in {folder!r}")
    return found


def _open_folder(path: Path, labels: bool) -> RawSource:
    listing = list_folder(path)
    of_suffix = {
        suffix: sorted(path / file.name for file in listing.files if suffix_of(file.name) == suffix)
        for suffix in (".parquet", ".tar")
    }
    if any(suffix_of(file.name) in IMAGE_SUFFIXES for file in listing.files):
        return _classified("a folder", FolderReader(path), listing, path, labels)
    if of_suffix[".parquet"]:
        return open_parquet(of_suffix[".parquet"])
    if not of_suffix[".tar"]:
        raise _nothing_usable(path, listing)
    tars, skipped = of_suffix[".tar"], listing.skipped
    files = []
    for number, tar in enumerate(tars):
        inner = list_tar(tar, number)
        prefix = f"{tar.stem}/" if len(tars) > 1 else ""
        files += [Listed(prefix + file.name, file.place) for file in inner.files]
        skipped += [Skipped(prefix + name, reason) for name, reason in inner.skipped]
    return _of_tars(tars, files, skipped, path, labels)


def _of_tars(tars: Sequence[Path], files: list[Listed], skipped: list[Skipped], path: Path, labels: bool) -> RawSource:
    """Webdataset shards, or archives of pictures, which then are a class each."""
    reader = RangeReader(tars)
    if is_webdataset(files) or (path / "manifest.json").is_file():
        items, names, more = webdataset_items(files, reader, path)
        if not items:
            raise _nothing_usable(path, Listing(files, skipped))
        return RawSource("webdataset shards", reader, items, names, (*skipped, *more))
    if len(tars) > 1 and all(_SHARD_NUMBER.search(tar.stem) for tar in tars):
        # Numbered archives without labels are parts of one set, not classes.
        return _classified("numbered tar archives", reader, Listing(files, skipped), path, False)
    return _classified("tar archives", reader, Listing(files, skipped), path, labels)


def _classified(kind: str, reader: Reader, listing: Listing, path: Path, labels: bool) -> RawSource:
    """Pictures with the label of their folder."""
    pictures, skipped = [], list(listing.skipped)
    for name, place in listing.files:
        parts = clean(name).split("/")
        if any(is_junk(part) for part in parts):
            continue
        if (suffix := suffix_of(name)) in IMAGE_SUFFIXES:
            pictures.append((parts, place))
        else:
            skipped.append(Skipped(name, f"not an image: suffix {suffix or '(none)'}"))
    if not pictures:
        raise _nothing_usable(path, listing)
    pictures.sort()
    above = _folders_of_all([parts[:-1] for parts, _ in pictures])
    folders = [parts[above] if len(parts) > above + 1 else None for parts, _ in pictures]
    names = _class_names(folders, path) if labels else ()
    number = {name: i for i, name in enumerate(names)}
    items = [
        RawItem("/".join(parts), number[folder] if names and folder is not None else None, place)
        for (parts, place), folder in zip(pictures, folders, strict=True)
    ]
    return RawSource(kind, reader, items, names, tuple(sorted(skipped)))


def _folders_of_all(folders: list[list[str]]) -> int:
    """How many folders hold everything."""
    low, high = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _class_names(folders: list[str | None], path: Path) -> tuple[str, ...]:
    """Of the class folders; empty if there are none.

    Raises:
        ValueError: if some pictures lie in no class folder, or the folders are splits of a data set.
    """
    counts = Counter(folders)
    if set(counts) == {None}:
        return ()
    if None in counts:
        raise ValueError(
            f"{path} holds {counts[None]} pictures beside class folders ({counts.total() - counts[None]} pictures in "
            f"{len(counts) - 1} folders): put them into class folders too, or all pictures into one folder"
        )
    names = tuple(sorted(name for name in counts if name is not None))
    if SPLITS.issuperset(name.lower() for name in names):
        raise ValueError(f"{path} holds the splits {', '.join(names)}: give one of them, such as {path / names[0]}")
    return names


def _nothing_usable(path: Path, listing: Listing) -> ValueError:
    suffixes = Counter(suffix_of(file.name) or "(no suffix)" for file in listing.files)
    found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "no files"
    if listing.skipped:
        found += f"; {len(listing.skipped)} unusable, such as {listing.skipped[0].name} ({listing.skipped[0].reason})"
    return ValueError(f"{path} holds no pictures that can be read. Found: {found}. Supported: {SUPPORTED}")
