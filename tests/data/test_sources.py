"""Raw sources: the same pictures and labels however they are packed; damaged and hostile archives."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shortcutflow.data.images import ImageError
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.readers import RawSource
from tests.data.pictures import (
    CLASSES,
    FILES,
    by_class,
    contents,
    picture,
    tar_of,
    webdataset_of,
    write_files,
    write_parquet,
    written,
    zip_of,
)


def class_tars(root: Path) -> Path:
    return write_files(root, {f"{name}.tar": tar_of(files) for name, files in by_class(FILES).items()})


def two_shards(root: Path, *, as_json: bool = False) -> Path:
    names = sorted(FILES)
    halves = [{name: FILES[name] for name in names[i::2]} for i in range(2)]
    shards = {f"part-{i:03d}.tar": webdataset_of(half, as_json=as_json) for i, half in enumerate(halves)}
    return write_files(root, shards)


def linked(root: Path) -> Path:
    write_files(root / "real", FILES)
    (root / "links").mkdir()
    for name in CLASSES:
        (root / "links" / name).symlink_to(root / "real" / name)
    (root / "links" / "ant" / "loop").symlink_to(root / "links")
    return root / "links"


def parquet_parts(root: Path) -> Path:
    pytest.importorskip("pyarrow")
    names = sorted(FILES)
    for i in range(2):
        write_parquet(root / "data" / f"train-0000{i}-of-00002.parquet", {name: FILES[name] for name in names[i::2]})
    return root


def one_parquet(root: Path) -> Path:
    pytest.importorskip("pyarrow")
    return write_parquet(root / "all.parquet", FILES, as_struct=False)


def under(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


NUMBERS = tuple("012")
SOURCES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "folder": (lambda root: write_files(root, FILES), CLASSES),
    "deeper": (
        lambda root: write_files(root, under({k.replace("/", "/x/y/"): v for k, v in FILES.items()}, "a/b")),
        CLASSES,
    ),
    "links": (linked, CLASSES),
    "zip": (lambda root: written(root / "x.zip", zip_of(FILES)), CLASSES),
    "stored zip": (lambda root: written(root / "x.zip", zip_of(FILES, zipfile.ZIP_STORED)), CLASSES),
    "zip with a folder": (lambda root: written(root / "x.zip", zip_of(under(FILES, "set"))), CLASSES),
    "inside a zip": (
        lambda root: written(root / "x.zip", zip_of(under(FILES, "train") | under(FILES, "val"))) / "train",
        CLASSES,
    ),
    "tar": (lambda root: written(root / "x.tar", tar_of(FILES)), CLASSES),
    "tar with ./": (lambda root: written(root / "x.tar", tar_of({f"./{k}": v for k, v in FILES.items()})), CLASSES),
    "tar of tars": (
        lambda root: written(root / "x.tar", tar_of({f"{k}.tar": tar_of(v) for k, v in by_class(FILES).items()})),
        CLASSES,
    ),
    "folder of class tars": (class_tars, CLASSES),
    "webdataset": (two_shards, NUMBERS),
    "webdataset json": (lambda root: two_shards(root, as_json=True), NUMBERS),
    "one shard": (lambda root: written(root / "x.tar", webdataset_of(FILES)), NUMBERS),
    "parquet parts": (parquet_parts, CLASSES),
    "one parquet": (one_parquet, NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_gives_the_same_pictures(kind: str, tmp_path: Path) -> None:
    make, names = SOURCES[kind]
    path = make(tmp_path / "raw")
    source = open_source(path)
    assert source.class_names == names
    assert source.skipped == ()
    assert contents(source) == sorted((v, CLASSES.index(k.partition("/")[0])) for k, v in FILES.items())
    assert len({item.name for item in source.items}) == len(FILES)
    again = open_source(path)
    assert (again.items, again.fingerprint()) == (source.items, source.fingerprint())
    other_process = pickle.loads(pickle.dumps(source.reader))  # the only pickle is our own
    assert [other_process.read(item) for item in source.items] == [source.read(item) for item in source.items]
    without = open_source(path, labels=False)
    assert without.class_names == ()
    assert {item.label for item in without.items} == {None}
    assert len(without.items) == len(FILES)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "numbered tars", "wrapped"])
def test_pictures_in_one_folder_have_no_labels(kind: str, tmp_path: Path) -> None:
    flat = {name.replace("/", "-"): content for name, content in FILES.items()}
    path = {
        "folder": lambda: write_files(tmp_path / "raw", flat),
        "zip": lambda: written(tmp_path / "x.zip", zip_of(flat)),
        "tar": lambda: written(tmp_path / "x.tar", tar_of(flat)),
        "numbered tars": lambda: write_files(
            tmp_path / "raw", {f"{i:03d}.tar": tar_of({k: flat[k] for k in sorted(flat)[i::2]}) for i in range(2)}
        ),
        "wrapped": lambda: written(tmp_path / "x.zip", zip_of({f"photos/{k}": v for k, v in flat.items()})),
    }[kind]()
    source = open_source(path)
    assert source.class_names == ()
    assert contents(source) == sorted((content, None) for content in flat.values())


def test_order_is_by_name_not_by_place(tmp_path: Path) -> None:
    backwards = dict(sorted(FILES.items(), reverse=True))
    sources = [
        open_source(write_files(tmp_path / "raw", backwards)),
        open_source(written(tmp_path / "x.zip", zip_of(backwards))),
        open_source(written(tmp_path / "x.tar", tar_of(backwards))),
    ]
    for source in sources:
        assert [item.name for item in source.items] == sorted(FILES)


@pytest.mark.parametrize("change", ["content", "name", "added", "removed"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_fingerprint_notices(change: str, kind: str, tmp_path: Path) -> None:
    def source(name: str, files: dict[str, bytes]) -> RawSource:
        if kind == "folder":
            return open_source(write_files(tmp_path / name, files))
        packed = zip_of(files) if kind == "zip" else tar_of(files)
        return open_source(written(tmp_path / name / f"x.{kind}", packed))

    changed = dict(FILES)
    if change == "content":
        changed["bee/01.jpg"] += b"more"
    elif change == "name":
        changed["bee/renamed.jpg"] = changed.pop("bee/01.jpg")
    elif change == "added":
        changed["bee/99.jpg"] = changed["bee/01.jpg"]
    else:
        del changed["bee/01.jpg"]
    before = source("before", FILES).fingerprint()
    assert source("same", dict(FILES)).fingerprint() == before
    assert source("after", changed).fingerprint() != before


def test_junk_is_ignored_and_other_files_are_listed(tmp_path: Path) -> None:
    junk = ["__MACOSX/ant/._00.jpg", "ant/._00.jpg", "ant/.DS_Store", "bee/Thumbs.db", "bee/desktop.ini", ".git/a.jpg"]
    files = FILES | dict.fromkeys(junk, b"junk") | {"ant/notes.txt": b"notes", "bee/README": b"", "LICENSE": b""}
    for path in (
        write_files(tmp_path / "raw", files),
        written(tmp_path / "x.zip", zip_of(files)),
        written(tmp_path / "x.tar", tar_of(files)),
    ):
        source = open_source(path)
        assert len(source.items) == len(FILES)
        assert [tuple(item) for item in source.skipped] == [
            ("LICENSE", "not an image: suffix (none)"),
            ("ant/notes.txt", "not an image: suffix .txt"),
            ("bee/README", "not an image: suffix (none)"),
        ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ant/0.jpg": b"", "bee/1.jpg": b"", "2.jpg": b""}, "1 images beside class folders"),
        ({"train/a/0.jpg": b"", "val/a/0.jpg": b""}, "holds the splits train, val: give one of them"),
        ({"a.txt": b"", "b.txt": b"", "c.csv": b""}, r"Found: 2 \.txt, 1 \.csv\. Supported: a folder"),
        ({}, "Found: no files"),
    ],
    ids=["mixed", "splits", "no pictures", "empty"],
)  # fmt: skip
def test_what_does_not_fit_is_said(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    for path in (write_files(tmp_path / "raw", files), written(tmp_path / "x.zip", zip_of(files))):
        path.mkdir(exist_ok=True) if not path.suffix else None
        with pytest.raises(ValueError, match=said):
            open_source(path)


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path / "nothing")
    archive = written(tmp_path / "x.zip", zip_of(FILES))
    with pytest.raises(FileNotFoundError, match="'dog'"):
        open_source(archive / "dog")
    with pytest.raises(ValueError, match="no images that can be read"):
        open_source(written(tmp_path / "x.h5", b"\x89HDF\r\n\x1a\n"))


@pytest.mark.parametrize(
    ("label", "said"), [(b"x", "'x'"), (b"-1", "label is -1,"), (b"99999999999", "99999"), (b"\xff", "label")]
)
def test_bad_labels_are_skipped(label: bytes, said: str, tmp_path: Path) -> None:
    members = {"a.jpg": picture(0), "a.cls": b"1", "b.jpg": picture(1), "b.cls": label, "c.jpg": picture(2)}
    source = open_source(written(tmp_path / "x.tar", tar_of(members)))
    assert [(item.name, item.label) for item in source.items] == [("a.jpg", 1)]
    assert {item.name for item in source.skipped} == {"b.jpg", "c.jpg"}
    assert any(said in item.reason for item in source.skipped)


def test_parquet_problems(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def table(name: str, **columns: object) -> Path:
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"no column of images.*text: string"):
        open_source(table("a.parquet", text=["x"]))
    source = open_source(table("b.parquet", image=[b"1", None, b"3", b"4"], label=[0, 1, -1, None]))
    assert [item.name for item in source.skipped] == ["b.parquet:2", "b.parquet:3"]
    assert source.read(source.items[0]) == b"1"
    with pytest.raises(ImageError, match="no bytes"):
        source.read(source.items[1])
    with pytest.raises(ValueError, match="below 1000000"):
        open_source(table("c.parquet", image=[b"1"], label=[10**12]))
    with pytest.raises(ValueError, match="not a readable parquet file"):
        open_source(written(tmp_path / "d.parquet", b"PAR1 and no more"))
    for split in ("train", "test"):
        write_parquet(tmp_path / "both" / f"{split}-00000.parquet", FILES)
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        open_source(tmp_path / "both")
