"""Damaged and hostile archives: nothing leaves them, nothing in them is taken at its word."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from shortcutflow.data.images import ImageError
from shortcutflow.data.sources import open_source, readers
from tests.data.pictures import (
    CLASSES,
    FILES,
    by_class,
    contents,
    picture,
    tar_of,
    write_files,
    written,
    zip_of,
)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compressed by gzip.*decompress it to a plain \.tar"):
        open_source(written(tmp_path / "x.tar.gz", gzip.compress(tar_of(FILES))))
    inner = {"ant.tar": tar_of({"0.jpg": picture(0)}), "bee.tar": gzip.compress(tar_of({"1.jpg": picture(1)}))}
    with pytest.raises(ValueError, match=r"lie in 'ant', .* \(bee\): choose with --labels folder"):
        open_source(written(tmp_path / "x.tar", tar_of(inner)))
    source = open_source(tmp_path / "x.tar", labels="folder")
    assert len(source.items) == 1
    assert ("bee.tar", "a tar compressed by gzip inside a tar: unpack it") in source.skipped


def test_names_lead_nowhere(tmp_path: Path) -> None:
    names = {"../../ant/0.jpg": picture(0), "/etc/1.jpg": picture(1), "a/../bee/2.jpg": picture(2)}
    for path in (written(tmp_path / "x.zip", zip_of(names)), written(tmp_path / "x.tar", tar_of(names))):
        before = set(tmp_path.rglob("*"))
        source = open_source(path)
        assert [item.name for item in source.items] == ["a/bee/2.jpg", "ant/0.jpg", "etc/1.jpg"]
        assert contents(source) == sorted((picture(i), label) for i, label in [(0, 1), (1, 2), (2, 0)])
        assert set(tmp_path.rglob("*")) == before


def test_links_out_of_a_tar_and_devices_are_left_out_and_listed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name in [
            (tarfile.SYMTYPE, "s"),
            (tarfile.LNKTYPE, "l"),
            (tarfile.CHRTYPE, "c"),
            (tarfile.FIFOTYPE, "f"),
        ]:
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = len(picture(0))
        tar.addfile(info, io.BytesIO(picture(0)))
    source = open_source(written(tmp_path / "x.tar", out.getvalue()))
    assert [item.name for item in source.items] == ["real.jpg"]
    assert [item.name for item in source.skipped] == ["c.jpg", "f.jpg", "l.jpg", "s.jpg"]


def test_links_in_a_zip_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("real.jpg", picture(0))
    assert [item.name for item in open_source(path).items] == ["real.jpg"]


def test_link_that_leads_nowhere(tmp_path: Path) -> None:
    root = write_files(tmp_path / "raw", FILES)
    os.symlink(tmp_path / "nowhere.jpg", root / "ant" / "broken.jpg")
    source = open_source(root)
    assert len(source.items) == len(FILES)
    assert [item.name for item in source.skipped] == ["ant/broken.jpg"]


def patched(content: bytes, offset: int, form: str, value: int) -> bytes:
    """A zip archive with another value in its directory."""
    start = content.rindex(b"PK\x01\x02") + offset
    return content[:start] + struct.pack(form, value) + content[start + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (8, "<H", 1, "encrypted"),
        (10, "<H", 99, "method 99"),
        (24, "<I", 2**31, "2147483648 bytes"),
    ],
    ids=["encrypted", "method", "size"],
)  # fmt: skip
def test_members_that_cannot_be_read_are_skipped(offset: int, form: str, value: int, said: str, tmp_path: Path) -> None:
    packed = patched(zip_of({"a.jpg": picture(0), "b.jpg": picture(1)}), offset, form, value)
    source = open_source(written(tmp_path / "x.zip", packed))
    assert [item.name for item in source.items] == ["a.jpg"]
    assert source.skipped[0].name == "b.jpg"
    assert said in source.skipped[0].reason


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(16, "<I", 12345), (24, "<I", 100), (24, "<I", 2**27), (42, "<I", 7)],
    ids=["checksum", "too short", "too long", "place"],
)
def test_members_that_lie_about_themselves(offset: int, form: str, value: int, tmp_path: Path) -> None:
    packed = patched(zip_of({"a.jpg": picture(0), "b.jpg": picture(1)}), offset, form, value)
    source = open_source(written(tmp_path / "x.zip", packed))
    assert source.read(source.items[0]) == picture(0)
    with pytest.raises(ImageError, match=r"damaged|ends before"):
        source.read(source.items[1])


def test_a_zip_bomb_is_not_inflated_beyond_its_promise(tmp_path: Path) -> None:
    packed = patched(zip_of({"a.jpg": b"\0" * 50_000_000}), 24, "<I", 1000)
    source = open_source(written(tmp_path / "x.zip", packed))
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ImageError, match="checksum"):
        source.read(source.items[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_too_large_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LARGEST_ITEM", 1000)
    for path in (
        write_files(tmp_path / "raw", FILES),
        written(tmp_path / "x.zip", zip_of(FILES)),
        written(tmp_path / "x.tar", tar_of(FILES)),
    ):
        source = open_source(path)
        with pytest.raises(ImageError, match="at most 1000"):
            source.read(source.items[0])


@pytest.mark.parametrize("length", [700, 5000, -1700])
def test_cut_off_archives(length: int, tmp_path: Path) -> None:
    whole = tar_of(FILES).rstrip(b"\0")
    with pytest.raises(ValueError, match=r"x\.tar is damaged"):
        open_source(written(tmp_path / "x.tar", whole[:length]))
    nested = tar_of({"ant.tar": tar_of({"0.jpg": picture(0)})[:1000], "bee.tar": tar_of({"1.jpg": picture(1)})})
    with pytest.raises(ValueError, match=r"x\.tar/ant\.tar is damaged"):
        open_source(written(tmp_path / "x.tar", nested))
    with pytest.raises(ValueError, match="damaged zip"):
        open_source(written(tmp_path / "x.zip", zip_of(FILES)[:length]))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(tar_of(FILES))
    place = content.index(b"bee/04.jpg")
    content[place + 124 : place + 136] = b"not a number"
    with pytest.raises(ValueError, match=rf"no readable header at byte {place}"):
        open_source(written(tmp_path / "x.tar", bytes(content)))


def test_an_inner_tar_ends_where_its_member_ends(tmp_path: Path) -> None:
    # Without the two empty blocks at its end, the next header read would be the outer one.
    def bare(files: dict[str, bytes]) -> bytes:
        packed = tar_of(files)
        name = list(files)[-1]
        start = packed.index(name.encode()) + 512
        return packed[: start + -(-len(files[name]) // 512) * 512]

    outer = tar_of({f"{name}.tar": bare(files) for name, files in by_class(FILES).items()})
    source = open_source(written(tmp_path / "x.tar", outer))
    assert contents(source) == sorted((v, CLASSES.index(k.partition("/")[0])) for k, v in FILES.items())
