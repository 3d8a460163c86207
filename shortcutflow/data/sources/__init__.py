"""Images wherever they lie: folders, zip and tar archives, parquet files and shards, recognised by their contents.

In folders and archives the first folder below the one that holds everything is the class, whatever lies deeper;
classes are numbered in the order of their names. Images that all lie in one folder have no labels, unless a
``dataset.json`` (EDM, StyleGAN), ``metadata.csv`` (Hugging Face) or files called ``KEY.cls`` (webdataset) give them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shortcutflow.data.shards import Skipped
from shortcutflow.data.sources.archives import (
    Listed,
    Listing,
    is_tar,
    list_folder,
    list_tar,
    list_zip,
    refuse_compressed,
    tar_stem,
)  # fmt: skip
from shortcutflow.data.sources.folder import images_of, nothing_usable
from shortcutflow.data.sources.labels import checked_choice
from shortcutflow.data.sources.parquet import open_parquet
from shortcutflow.data.sources.readers import FolderReader, RangeReader, RawSource, ZipReader
from shortcutflow.data.sources.splits import NUMBERED, check_files
from shortcutflow.data.sources.webdataset import IMAGE_SUFFIXES, suffix_of

_URL = re.compile(r"(https?|s3|gs|hf|ftp|pipe):", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*,[^{}]*|(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?)\}")
_MOST_FILES = 1_000_000
_KINDS = {".parquet": "parquet files", ".tar": "tar archives"}


def open_source(path: Path, *, labels: bool | str = True) -> RawSource:
    """List the images of a source, without reading them.

    Args:
        path: a folder or a file; a folder inside an archive, as in ``imagenet.zip/train``; or files by braces or
            wildcards, as in ``s-{000000..000012}.tar`` and ``train-*.parquet``.
        labels: True takes the labels that are there; False ("none") takes none, so that images may lie at any depth;
            for the rest see :data:`~shortcutflow.data.sources.labels.LabelChoice`.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is none of the supported kinds, saying what was found; or damaged; or ambiguous.
    """
    choice = checked_choice(labels)
    if url := _URL.match(str(path)):
        names = braced(str(path))
        what = f"{len(names)} files, {names[0]} to {names[-1]}" if len(names) > 1 else "it"
        raise ValueError(f"{path}: files are prepared from a local disk, not from {url[1]}: download {what} first")
    archive = next((place for place in (path, *path.parents) if place.is_file()), None)
    if archive is not None:
        return _open_file(archive, path.relative_to(archive).as_posix(), path, choice)
    if path.is_dir():
        return _open_folder(path, choice)
    if files := expand(path):
        return _open_files(files, path, choice)
    raise FileNotFoundError(f"there is no {path}")


def expand(path: Path) -> list[Path]:
    """The files that braces (as webdataset's URLs have them) and wildcards stand for; none if it has neither.

    Raises:
        FileNotFoundError: naming one that the braces promise and that is not there.
    """
    found = [Path(name) for name in dict.fromkeys(braced(str(path)))]
    if any(wild in path.name for wild in "*?["):
        return [file for place in found for file in sorted(place.parent.glob(place.name)) if file.is_file()]
    missing = [place for place in found if not place.is_file()]
    if missing and len(found) > 1:
        raise FileNotFoundError(f"there is no {missing[0]}, one of the {len(found)} files of {path}")
    return [] if missing else found


def braced(text: str) -> list[str]:
    """The names that braces stand for, by webdataset's rule.

    Raises:
        ValueError: if they are more than a million.
    """
    from webdataset.shardlists import expand_urls

    count = 1
    for braces in _BRACES.finditer(text):
        step = abs(int((braces[4] or "..1")[2:])) or 1
        count *= abs(int(braces[3]) - int(braces[2])) // step + 1 if braces[2] else braces[1].count(",") + 1
    if count > _MOST_FILES:
        raise ValueError(f"{text} stands for {count} files, at most {_MOST_FILES} are read")
    return expand_urls(text)


def _open_file(archive: Path, inside: str, path: Path, choice: bool | str) -> RawSource:
    with archive.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{archive} is empty: it has 0 bytes")
    refuse_compressed(archive, head)
    if head.startswith(b"PAR1"):
        return open_parquet([archive], archive.parent, choice)
    if head.startswith(b"PK"):
        listing = _inside(list_zip(archive), inside, path)
        return images_of("a zip archive", ZipReader(archive), listing, path, choice)
    if head[257:262] == b"ustar" or archive.suffix == ".tar":
        listing = _inside(list_tar(archive), inside, path)
        return images_of("tar archives", RangeReader([archive]), listing, path, choice, shards=True)
    raise nothing_usable(path, Listing([Listed(archive.name, ())], [], set()))


def _inside(listing: Listing, folder: str, path: Path) -> Listing:
    """What lies in one folder of an archive."""
    if folder == ".":
        return listing
    found = listing.below(folder)
    if not found.files:
        raise FileNotFoundError(f"there is no {path}: the archive holds no files in {folder!r}")
    return found


def _open_folder(path: Path, choice: bool | str) -> RawSource:
    listing = list_folder(path)
    of_kind: dict[str, list[str]] = {}
    for file in listing.files:
        suffix = suffix_of(file.name)
        kind = "images" if suffix in IMAGE_SUFFIXES else _KINDS.get(suffix)
        if kind is not None:
            of_kind.setdefault(kind, []).append(file.name)
    if len(of_kind) > 1:
        held = " beside ".join(f"{len(names)} {kind} ({min(names)})" for kind, names in sorted(of_kind.items()))
        first = [path / min(names) for names in of_kind.values()]
        ways = " or ".join(f"'{file.with_name('*' + file.suffix)}'" for file in first)
        raise ValueError(f"{path} holds {held}, which are no one set: give the folder of one kind, or {ways}")
    if not of_kind or "images" in of_kind:
        return images_of("a folder", FolderReader(path), listing, path, choice)
    [(kind, names)] = of_kind.items()
    for name in sorted({file.name for file in listing.files} - set(names)):
        if kind == "tar archives" and is_tar(name):
            raise ValueError(f"{path / name} is compressed and lies beside {min(names)}: decompress it to a plain .tar")
        listing.skipped.append(Skipped(name, f"none of the {kind}: suffix {suffix_of(name) or '(none)'}"))
    if kind == "parquet files":
        source = open_parquet([path / name for name in names], path, choice)
        return replace(source, skipped=(*listing.skipped, *source.skipped))
    return _of_tars([path / name for name in sorted(names)], path, path, listing.skipped, choice)


def _open_files(files: Sequence[Path], path: Path, choice: bool | str) -> RawSource:
    """Parquet files, tar archives, or images that a pattern names."""
    suffixes = Counter(suffix_of(file.name) for file in files)
    root = Path(*_common([file.parts[:-1] for file in files]))
    if set(suffixes) == {".parquet"}:
        return open_parquet(files, root, choice)
    if set(suffixes) == {".tar"}:
        return _of_tars(files, root, path, [], choice)
    if IMAGE_SUFFIXES.issuperset(suffixes):
        names = [file.relative_to(root).as_posix() for file in files]
        listed = [Listed(name, (name, file.stat().st_size)) for name, file in zip(names, files, strict=True)]
        return images_of("a folder", FolderReader(root), Listing(listed, [], set()), path, choice)
    found = ", ".join(f"{count} {suffix or '(no suffix)'}" for suffix, count in suffixes.items())
    raise ValueError(f"{path} names files of several kinds ({found}): name parquet files, tar archives or images only")


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    low, high = min(paths), max(paths)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))]


def _of_tars(tars: Sequence[Path], root: Path, path: Path, skipped: list[Skipped], choice: bool | str) -> RawSource:
    """Webdataset shards, or archives of images, which then are a class each."""
    names = [tar.relative_to(root).as_posix() for tar in tars]
    if choice != "folder":
        check_files(names, root)
    found, prefixes = Listing([], list(skipped), set()), []
    for number, (tar, name) in enumerate(zip(tars, names, strict=True)):
        inner = list_tar(tar, number)
        prefixes.append(f"{tar_stem(name)}/" if len(tars) > 1 else "")
        found.files.extend(Listed(prefixes[-1] + file.name, file.place) for file in inner.files)
        found.skipped.extend(Skipped(prefixes[-1] + name, reason) for name, reason in inner.skipped)
        found.folders.update(prefixes[-1] + folder for folder in inner.folders)
        if prefixes[-1]:
            found.folders.add(prefixes[-1][:-1])
    # Numbered archives are parts of one set, not classes.
    numbered = len(tars) > 1 and all(NUMBERED.search(tar.stem) for tar in tars) and choice != "folder"
    kind = "numbered tar archives" if numbered else "tar archives"
    return images_of(
        kind, RangeReader(tars), found, path, choice, shards=True, prefixes=prefixes if numbered else ()
    )  # fmt: skip
