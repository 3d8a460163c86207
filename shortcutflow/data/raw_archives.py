"""What lies in folders, tar archives (also tars of tars) and zip archives: files by name, without unpacking."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shortcutflow.data.raw_items import LARGEST_ITEM, ZIP_DEFLATED, ZIP_STORED
from shortcutflow.data.shards import Skipped

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin."""


class Listed(NamedTuple):
    """A file in a source: its name with "/" between folders, and where its reader finds it."""

    name: str
    place: tuple[int | str, ...]


class Listing(NamedTuple):
    """All files of a source, and those that cannot be read."""

    files: list[Listed]
    skipped: list[Skipped]


def list_folder(root: Path) -> Listing:
    """Files at any depth, through links too. Links that lead nowhere are skipped."""
    listing = Listing([], [])
    _walk(root, "", frozenset(), listing)
    return listing


def _walk(folder: Path, prefix: str, above: frozenset[str], listing: Listing) -> None:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if is_junk(entry.name):
                continue
            if entry.is_dir():
                _walk(Path(entry.path), name + "/", above | {real}, listing)
            elif entry.is_file():
                listing.files.append(Listed(name, (name, entry.stat().st_size)))
            elif entry.is_symlink():
                listing.skipped.append(Skipped(name, "a link that leads nowhere"))


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is left behind by an operating system or hidden."""
    return name.startswith(".") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")


def list_zip(path: Path) -> Listing:
    """Regular members that are stored or deflated.

    Raises:
        ValueError: if its directory is damaged.
    """
    listing = Listing([], [])
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged zip archive: {error}") from error
    for member in members:
        name = clean(member.filename.replace("\\", "/"))
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.is_dir() or kind not in (0, stat.S_IFREG):
            continue
        if member.flag_bits & 1:
            listing.skipped.append(Skipped(name, "encrypted"))
        elif member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            reason = f"compressed by zip's method {member.compress_type}; only stored and deflated members are read"
            listing.skipped.append(Skipped(name, reason))
        elif max(member.file_size, member.compress_size) > LARGEST_ITEM:
            listing.skipped.append(_too_large(name, member.file_size))
        else:
            place = (
                member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC
            )  # fmt: skip
            listing.files.append(Listed(name, place))
    return listing


def _too_large(name: str, size: int) -> Skipped:
    return Skipped(name, f"it has {size} bytes, at most {LARGEST_ITEM} are read")


def clean(name: str) -> str:
    """A member's name without what would lead out of a folder."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def list_tar(path: Path, number: int = 0) -> Listing:
    """Regular members; those of a tar inside it as ``NAME/MEMBER``, as ImageNet's tar of a tar for each class has them.

    Args:
        path: of the archive.
        number: of this file in the places.

    Raises:
        ValueError: if it is damaged, cut off or compressed.
    """
    listing = Listing([], [])
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        _list_members(file, 0, size, str(path), number, listing, prefix="")
    return listing


def _list_members(
    file: BinaryIO, start: int, end: int, where: str, number: int, listing: Listing, *, prefix: str
) -> None:
    for member in _members(file, start, end, where):
        name = clean(prefix + member.name)
        if is_junk(name.rpartition("/")[2]):
            continue
        if name.endswith(".tar") and not prefix:
            _list_inner(file, member, where, number, listing)
        elif member.size > LARGEST_ITEM:
            listing.skipped.append(_too_large(name, member.size))
        else:
            listing.files.append(Listed(name, (number, member.offset_data, member.size)))


def _list_inner(file: BinaryIO, member: tarfile.TarInfo, where: str, number: int, listing: Listing) -> None:
    name = clean(member.name)
    end = member.offset_data + member.size
    file.seek(member.offset_data)  # the outer walk seeks back before its next header
    compression = compression_of(file.read(8))
    if compression is not None:
        listing.skipped.append(Skipped(name, f"a tar compressed by {compression} inside a tar: unpack it"))
        return
    inner = name.removesuffix(".tar") + "/"
    _list_members(file, member.offset_data, end, f"{where}/{name}", number, listing, prefix=inner)


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins like this."""
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)


def _members(file: BinaryIO, start: int, end: int, where: str) -> Iterator[tarfile.TarInfo]:
    """Regular members between two offsets of a file; links, devices and folders are passed over."""
    if start == end:
        return
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None and member.offset < end:
                tar.members.clear()  # type: ignore[attr-defined]  # a million of them would fill the memory
                if member.offset_data + member.size > end:
                    raise ValueError(f"{where} is damaged or cut off: {member.name!r} runs over its end")
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                    yield member
            # tarfile takes a damaged header for the end; the real end is zeros, or the end of the file.
            file.seek(min(tar.offset, end))
            rest = file.read(min(tarfile.BLOCKSIZE, end - min(tar.offset, end)))
    except tarfile.TarError as error:
        raise ValueError(f"{where} is damaged or cut off: {error}") from error
    if rest.strip(b"\0"):
        raise ValueError(f"{where} is damaged: there is no readable header at byte {tar.offset}")
