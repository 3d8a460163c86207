"""Images wherever they lie: folders, zip and tar archives, parquet files and shards, recognised by their contents.

In folders and archives the first folder below the one that holds everything is the class, whatever lies deeper;
classes are numbered in the order of their names. Images that all lie in one folder have no labels, unless a
``dataset.json`` (EDM, StyleGAN), ``metadata.csv`` (Hugging Face) or files called ``KEY.cls`` (webdataset) give them.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from posixpath import commonpath, dirname
from urllib.parse import urlsplit

from tqdm import tqdm

from shortcutflow.data.index import Skipped
from shortcutflow.data.remote import is_url, local_copy
from shortcutflow.data.sources import archives
from shortcutflow.data.sources.archives import Listing, is_tar, tar_stem
from shortcutflow.data.sources.folder import images_of, nothing_usable
from shortcutflow.data.sources.labels import choice_of
from shortcutflow.data.sources.parquet import open_parquet
from shortcutflow.data.sources.readers import FolderReader, RangeReader, RawItem, RawSource, ZipReader
from shortcutflow.data.sources.splits import NUMBERED, check_files
from shortcutflow.data.sources.webdataset import IMAGE_SUFFIXES, suffix_of

FETCHED_AT_ONCE = 4
_BRACES = re.compile(r"\{([^{}]*,[^{}]*|(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?)\}")
_MOST_FILES = 1_000_000
_KINDS = {".parquet": "parquet files", ".tar": "tar archives"} | dict.fromkeys(IMAGE_SUFFIXES, "images")


def open_source(
    source: str | Path, *, labels: bool | str = True, encoding: str | None = None, cache: Path = Path("data/cache")
) -> RawSource:
    """List the images of a source, without reading them.

    Args:
        source: a folder or a file; a folder inside an archive, as in ``imagenet.zip/train``; files by braces or
            wildcards, as in ``s-{000000..000012}.tar`` and ``train-*.parquet``; or URLs of archives or parquet files
            (``http(s)://``, ``s3://``, ``gs://``, ``hf://``), with braces too, which are fetched first.
        labels: True takes the labels that are there; False ("none") takes none, so that images may lie at any depth;
            for the rest see :data:`~shortcutflow.data.sources.labels.LabelChoice`.
        encoding: of the names in archives that are not UTF-8, such as ``gbk``.
        cache: for the files of URLs, which are kept there.

    Raises:
        FileNotFoundError: if there is nothing.
        ReadError: if a URL cannot be fetched.
        ValueError: if it is none of the supported kinds, saying what was found; or damaged; or ambiguous.
    """
    choice: bool | str = choice_of(labels)
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise ValueError(f"{error}; known are gbk, shift_jis, euc_kr, latin-1, cp437, ...") from error
    elif choice is False:
        encoding = "cp437"  # names matter to classes alone
    if is_url(source):
        named, root = _fetched(str(source), cache)
        return _open_files(named, root, str(source), choice, encoding)
    path = Path(source)
    archive = next((place for place in (path, *path.parents) if place.is_file()), None)
    if archive is not None:
        inside = path.relative_to(archive).as_posix()
        return _open_files({archive.name: archive}, str(archive.parent), str(path), choice, encoding, inside=inside)
    if path.is_dir():
        return _open_folder(path, choice, encoding)
    if files := expand(path):
        root = commonpath([file.parent.as_posix() for file in files])
        named = {file.relative_to(root).as_posix(): file for file in files}
        return _open_files(named, root, str(path), choice, encoding)
    raise FileNotFoundError(f"there is no {path}")


def _fetched(url: str, cache: Path) -> tuple[dict[str, Path], str]:
    """Local copies of archives or parquet files elsewhere, by their names below a URL, and this URL."""
    urls = list(dict.fromkeys(braced(url)))
    paths = [urlsplit(url).path.strip("/") for url in urls]
    if len(set(paths)) < len(paths) or "*" in url:
        raise ValueError(f"{url}: name several files by braces in the path, such as s-{{000000..000012}}.tar")
    with (
        ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="fetch") as pool,
        tqdm(pool.map(lambda url: local_copy(url, cache), urls), "fetching", len(urls), unit="file", delay=2) as copies,
    ):
        files = list(copies)
    root = commonpath([dirname(path) for path in paths])
    names = [path[len(root) :].lstrip("/") for path in paths]
    return dict(zip(names, files, strict=True)), urls[0].removesuffix(names[0]).rstrip("/")


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


def _open_folder(path: Path, choice: bool | str, encoding: str | None) -> RawSource:
    listing = archives.list_folder(path)
    of_kind: dict[str, list[str]] = {}
    for file in listing.files:
        if (kind := _KINDS.get(suffix_of(file.name))) is not None:
            of_kind.setdefault(kind, []).append(file.name)
    if len(of_kind) > 1:
        held = " beside ".join(f"{len(names)} {kind} ({min(names)})" for kind, names in sorted(of_kind.items()))
        first = [path / min(names) for names in of_kind.values()]
        ways = " or ".join(f"'{file.with_name('*' + file.suffix)}'" for file in first)
        raise ValueError(f"{path} holds {held}, which are no one set: give the folder of one kind, or {ways}")
    if not of_kind or "images" in of_kind:
        return images_of("a folder", FolderReader(path), listing, str(path), choice)
    [(kind, names)] = of_kind.items()
    skipped = list(listing.skipped)
    for name in sorted({file.name for file in listing.files} - set(names)):
        if kind == "tar archives" and is_tar(name):
            raise ValueError(f"{path / name} is compressed and lies beside {min(names)}: decompress it to a plain .tar")
        skipped.append(Skipped(name, f"none of the {kind}: suffix {suffix_of(name) or '(none)'}"))
    return _open_files({name: path / name for name in names}, str(path), str(path), choice, encoding, skipped)


def _open_files(
    named: Mapping[str, Path], root: str, where: str, choice: bool | str, encoding: str | None,
    skipped: Sequence[Skipped] = (), inside: str = ".",
) -> RawSource:  # fmt: skip
    """A zip archive, parquet files, tar archives or images.

    Args:
        named: each file by its name below ``root``.
        root: folder or URL that holds all.
        where: they lie as it was given, for messages.
        choice: of the labels.
        encoding: of names in archives.
        skipped: other files that lie there.
        inside: a folder inside of one archive.
    """
    suffixes = Counter(suffix_of(name) for name in named)
    kinds = {_KINDS.get(suffix) for suffix in suffixes}
    if len(named) == 1:
        [(name, file)] = named.items()
        kinds = {_kind_of(file, name, where)}
    if kinds == {"parquet files"}:
        source = open_parquet(named, root, choice)
        return replace(source, skipped=(*skipped, *source.skipped))
    if kinds == {"tar archives"}:
        return _of_tars(dict(sorted(named.items())), root, where, choice, encoding, skipped, inside)
    if kinds == {"a zip archive"}:
        listing = _inside(archives.list_zip(file, encoding), inside, where)
        return images_of("a zip archive", ZipReader([file]), listing, where, choice)
    if kinds == {"images"} and not is_url(where):
        listed = [RawItem(name, None, (name, file.stat().st_size)) for name, file in named.items()]
        return images_of("a folder", FolderReader(Path(root)), Listing(listed, [], set()), where, choice)
    if len(named) == 1:
        raise nothing_usable(where, Listing([RawItem(name, None, ())], [], set()))
    found = ", ".join(f"{count} {suffix or '(no suffix)'}" for suffix, count in suffixes.items())
    raise ValueError(f"{where} names files of several kinds ({found}): name parquet files, tar archives or images only")


def _kind_of(file: Path, name: str, where: str) -> str | None:
    """What a file's content, or else its name, says it is."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        raise ValueError(f"{where} is empty: it has 0 bytes")
    archives.refuse_compressed(where, head)
    if head.startswith(b"PAR1"):
        return "parquet files"
    if head.startswith(b"PK"):
        return "a zip archive"
    return "tar archives" if head[257:262] == b"ustar" or name.endswith(".tar") else None


def _inside(listing: Listing, folder: str, where: str) -> Listing:
    if folder == ".":
        return listing
    if not (below := listing.below(folder)).files:
        raise FileNotFoundError(f"there is no {where}: the archive holds no files in {folder!r}")
    return below


def _of_tars(
    tars: Mapping[str, Path], root: str, where: str, choice: bool | str, encoding: str | None,
    skipped: Sequence[Skipped], inside: str,
) -> RawSource:  # fmt: skip
    """Webdataset shards, or archives of images, which if there are several are a class each."""
    if choice != "folder":
        check_files(tars, root)
    found, prefixes = Listing([], list(skipped), set()), []
    for number, (name, tar) in enumerate(tars.items()):
        inner = _inside(archives.list_tar(tar, number, encoding), inside, where)
        prefix = f"{tar_stem(name)}/" if len(tars) > 1 else ""
        found.files.extend(file._replace(name=prefix + file.name) for file in inner.files)
        found.skipped.extend(Skipped(prefix + name, reason) for name, reason in inner.skipped)
        found.folders.update(prefix + folder for folder in inner.folders)
        if prefix:
            found.folders.add(prefix[:-1])
        prefixes.append(prefix)
    # Numbered archives are parts of one set, not classes.
    numbered = len(tars) > 1 and all(NUMBERED.search(tar_stem(name)) for name in tars) and choice != "folder"
    return images_of(
        "numbered tar archives" if numbered else "tar archives", RangeReader(list(tars.values())), found, where, choice,
        shards=True, prefixes=prefixes if numbered else (),
    )  # fmt: skip
