"""What lies in folders, tar archives (also tars of tars) and zip archives: files by name, without unpacking."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shortcutflow.data.index import Skipped
from shortcutflow.data.sources.readers import LARGEST_ITEM, RawItem

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_JUNK = {
    "__macosx", "network trash folder", "temporary items", "icon\r", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db",
    "desktop.ini", "$recycle.bin", "recycler", "system volume information", "found.000", "@eadir", "@tmp", "#recycle",
    "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "lost+found", "__pycache__", "picasa.ini", "_vti_cnf",
}  # fmt: skip
_TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz)$", re.IGNORECASE)


class Listing(NamedTuple):
    """All files of a source, those that cannot be read, and its folders."""

    files: list[RawItem]
    skipped: list[Skipped]
    folders: set[str]

    def below(self, folder: str) -> Listing:
        """What lies in one of its folders."""
        start = folder + "/"
        return Listing(
            [file for file in self.files if file.name.startswith(start)],
            [item for item in self.skipped if item.name.startswith(start)],
            {name for name in self.folders if name.startswith(start)},
        )

    def without_doubles(self) -> Listing:
        """Of files with one name, unpacking leaves the last."""
        last = {file.name: file for file in self.files}
        reason = "a later file of the archive has the same name"
        doubles = [Skipped(file.name, reason) for file in self.files if last[file.name] is not file]
        return Listing(list(last.values()), self.skipped + doubles, self.folders)


def list_folder(root: Path) -> Listing:
    """Files at any depth, through links too. Links that lead nowhere are skipped.

    Raises:
        ValueError: naming a file or folder whose name is not UTF-8.
    """
    listing = Listing([], [], set())

    def walk(folder: str, prefix: str, above: frozenset[str]) -> None:
        real = os.path.realpath(folder)
        if real in above:  # a link to a folder that it lies in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if _is_junk(entry.name):
                    continue
                if not _is_utf8(name):
                    raise ValueError(
                        f"the name {os.fsencode(name)!r} in {folder} is not UTF-8: rename it, such as by convmv"
                    )
                if entry.is_dir():
                    listing.folders.add(name)
                    walk(entry.path, name + "/", above | {real})
                elif entry.is_file():
                    listing.files.append(RawItem(name, None, (name, entry.stat().st_size)))
                else:
                    reason = "a link that leads nowhere" if entry.is_symlink() else "neither a plain file nor a link"
                    listing.skipped.append(Skipped(name, reason))

    walk(str(root), "", frozenset())
    return listing


def _is_utf8(name: str) -> bool:
    """Whether a name holds no stand-ins for bytes that are not UTF-8."""
    return name.encode(errors="replace").decode() == name


def _is_junk(name: str) -> bool:
    """Whether a path has a part that is hidden, or left behind by an operating system or a storage device."""
    return any(
        part.startswith(".") or part.lower() in _JUNK or part.lower().endswith(":zone.identifier")
        for part in name.split("/")
    )


def list_zip(path: Path, encoding: str | None = None) -> Listing:
    """Regular members that are stored or deflated.

    Args:
        path: of the archive.
        encoding: of the names that are not marked as UTF-8, which many writers leave out; None for UTF-8.

    Raises:
        ValueError: if its directory is damaged, or names need another encoding.
    """
    listing = Listing([], [], set())
    try:
        with zipfile.ZipFile(path, metadata_encoding=encoding or "utf-8") as archive:
            members = archive.infolist()
    except UnicodeDecodeError as error:
        raise _other_encoding(error.object, path) from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged zip archive: {error}") from error
    for member in members:
        name = _clean(member.filename.replace("\\", "/"))
        if _is_junk(name):
            continue
        if member.is_dir() or member.filename.endswith("\\"):
            listing.folders.add(name)
        elif reason := _unreadable(member):
            listing.skipped.append(Skipped(name, reason))
        else:
            place = (member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC)
            listing.files.append(RawItem(name, None, place))
    return listing.without_doubles()


def _other_encoding(name: bytes, where: Path | str) -> ValueError:
    return ValueError(
        f"the name {name!r} in {where} is not UTF-8: which encoding is it? Choose with --encoding gbk, or another, "
        "such as shift_jis, euc_kr, latin-1 or cp437 (in a recipe: data.encoding=gbk)"
    )


def _unreadable(member: zipfile.ZipInfo) -> str:
    """Why a member is not read; empty if it is."""
    if (kind := stat.S_IFMT(member.external_attr >> 16)) not in (0, stat.S_IFREG):
        return "a symbolic link in a zip archive" if kind == stat.S_IFLNK else "no regular file"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by zip's method {member.compress_type}; only stored and deflated members are read"
    return _too_large(member.file_size) if max(member.file_size, member.compress_size) > LARGEST_ITEM else ""


def _too_large(size: int) -> str:
    return f"it has {size} bytes, at most {LARGEST_ITEM} are read"


def _clean(name: str) -> str:
    """A member's name without what would lead out of a folder."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def list_tar(path: Path, number: int = 0, encoding: str | None = None) -> Listing:
    """Regular members and links to them; those of a tar inside it as ``NAME/MEMBER``, as in ImageNet's tar of tars.

    Args:
        path: of the archive.
        number: of this file in the places.
        encoding: of the names; None for UTF-8.

    Raises:
        ValueError: if it is damaged, cut off or compressed, or names need another encoding.
    """
    listing = Listing([], [], set())

    def add(start: int, end: int, where: str, prefix: str = "") -> None:
        links: dict[str, str] = {}
        for member in tar_members(file, start, end, where, encoding):
            name = _clean(prefix + member.name)
            if _is_junk(name):
                continue
            if not _is_utf8(name):
                raise _other_encoding(os.fsencode(name), where)
            if member.isdir():
                listing.folders.add(name)
            elif member.islnk():
                links[name] = _clean(prefix + member.linkname)
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif not member.isreg() or member.issparse():
                listing.skipped.append(Skipped(name, "neither a plain file nor a link"))
            elif is_tar(name) and not prefix:
                inner = tar_stem(name)
                listing.folders.add(inner)  # also if it cannot be read: numbers of later classes depend on it
                file.seek(member.offset_data)  # the outer walk seeks back before its next header
                if compression := _compression_of(file.read(8)):
                    listing.skipped.append(Skipped(name, f"a tar compressed by {compression} inside a tar: unpack it"))
                else:
                    add(member.offset_data, member.offset_data + member.size, f"{where}/{name}", inner + "/")
            elif member.size > LARGEST_ITEM:
                listing.skipped.append(Skipped(name, _too_large(member.size)))
            else:
                listing.files.append(RawItem(name, None, (number, member.offset_data, member.size)))
        _follow(links, listing)

    with path.open("rb") as file:
        refuse_compressed(path, file.read(8))
        add(0, os.fstat(file.fileno()).st_size, str(path))
    return listing.without_doubles()


def _follow(links: dict[str, str], listing: Listing) -> None:
    """List links within an archive as the files that they lead to."""
    places = {file.name: file.place for file in listing.files} if links else {}
    for name, target in links.items():
        passed = {name}
        while target in links and target not in passed:
            passed.add(target)
            target = links[target]
        if target in places and target not in links:
            listing.files.append(RawItem(name, None, places[target]))
        elif below := [file for file in listing.files if file.name.startswith(target + "/")]:
            listing.folders.add(name)
            listing.files.extend(file._replace(name=name + file.name[len(target) :]) for file in below)
        else:
            listing.skipped.append(Skipped(name, f"a link to {target!r}, which is no file of the archive"))


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar archive, compressed ones too."""
    return _TAR.search(name) is not None


def tar_stem(name: str) -> str:
    """The name of a tar archive without its suffixes."""
    return _TAR.sub("", name)


def refuse_compressed(path: Path | str, head: bytes) -> None:
    """Raise ValueError for a file that begins as a compressed one does."""
    if compression := _compression_of(head):
        raise ValueError(
            f"{path} is compressed by {compression}: decompress it to a plain .tar, or unpack it; members of a "
            "compressed one cannot be read in any order"
        )


def _compression_of(head: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


def tar_members(
    file: BinaryIO, start: int, end: int, where: str, encoding: str | None = None
) -> Iterator[tarfile.TarInfo]:
    """All members between two offsets of a file, also of tars that were appended to each other.

    Raises:
        ValueError: if it is damaged or cut off, naming ``where`` it is.
    """
    while start < end:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding=encoding) as tar:
                while (member := tar.next()) is not None and member.offset < end:
                    tar.members.clear()  # type: ignore[attr-defined]  # a million of them would fill the memory
                    if member.isreg() and member.offset_data + member.size > end:
                        raise ValueError(f"{where} is damaged or cut off: {member.name!r} runs over its end")
                    yield member
                # tarfile takes a damaged header for the end; the real end is zeros, or the end of the file.
                stop = min(tar.offset, end)
        except tarfile.TarError as error:
            raise ValueError(f"{where} is damaged or cut off: {error}") from error
        file.seek(stop)
        if file.read(min(tarfile.BLOCKSIZE, end - stop)).strip(b"\0"):
            raise ValueError(f"{where} is damaged: there is no readable header at byte {stop}")
        start = _after_zeros(file, stop, end)


def _after_zeros(file: BinaryIO, start: int, end: int) -> int:
    """The first block after ``start`` that is not zeros."""
    file.seek(start)
    while start < end and (chunk := file.read(min(2**20, end - start))):
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(chunk)
    return end
