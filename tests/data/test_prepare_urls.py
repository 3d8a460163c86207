"""``shortcutflow prepare`` of URLs: archives, parquet files and shards are fetched once and read as local ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shortcutflow.cli import main
from shortcutflow.data import remote
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.prepare import prepare
from shortcutflow.data.sources import open_source
from tests.data.pictures import (
    CLASSES,
    FILES,
    by_class,
    contents,
    files_of,
    tar_of,
    webdataset_of,
    write_files,
    write_parquet,
    zip_of,
)  # fmt: skip
from tests.data.test_remote import Server

HALVES = [{name: FILES[name] for name in sorted(FILES)[i::2]} for i in range(2)]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """Archives of the same images, and parquet files."""
    shards = [webdataset_of(half) for half in HALVES]
    by_name = {f"{name}.tar": tar_of(files) for name, files in by_class(FILES).items()}
    root = write_files(tmp_path / "served", by_name | {"x.zip": zip_of(FILES), "x.tar": tar_of(FILES)})
    names = ("s-000.tar", "s-001.tar", "train-0.tar", "val-0.tar")
    return write_files(root, dict(zip(names, shards * 2, strict=True)) | {"notes.txt": b"dear"})


@pytest.fixture
def server(served: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    serving = Server(served)
    yield serving
    serving.close()


@pytest.mark.parametrize(
    ("name", "classes"),
    [("x.zip", CLASSES), ("x.tar", CLASSES), ("s-{000..001}.tar", ("0", "1", "2")), ("{ant,bee,cat}.tar", CLASSES)],
)
def test_archives(name: str, classes: tuple[str, ...], served: Path, server: Server, tmp_path: Path) -> None:
    source = open_source(f"{server.url}/{name}", cache=tmp_path / "cache")
    local = open_source(served / name)
    assert source.class_names == local.class_names == classes
    assert [item.name for item in source.items] == [item.name for item in local.items]
    assert contents(source) == contents(local)
    assert source.skipped == local.skipped


def test_parquet_files(served: Path, server: Server, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for i, half in enumerate(HALVES):
        write_parquet(served / f"train-{i}.parquet", half)
    for name in ("train-0.parquet", "train-{0..1}.parquet"):
        source = open_source(f"{server.url}/{name}", cache=tmp_path / "cache")
        local = open_source(served / name)
        assert [item.name for item in source.items] == [item.name for item in local.items]
        assert contents(source) == contents(local)
        assert source.class_names == CLASSES


def test_the_command_fetches_once_and_makes_the_same_shards(
    served: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failures are tried again; a file that has changed is another source."""
    server.answer = lambda name, count, content: (200, content[: len(content) // 2] if count == 1 else content)
    command = ["prepare", f"{server.url}/s-{{000..001}}.tar", str(tmp_path / "out"), "--size", "8", "--workers", "0"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--cache", str(tmp_path / "cache")])
        assert "11 samples, 3 classes, 1 shards" in capsys.readouterr().out
    assert server.requests == {"s-000.tar": 2, "s-001.tar": 2}
    prepare(served / "s-{000..001}.tar", tmp_path / "local", size=8, workers=0, progress=False)
    found, local = files_of(tmp_path / "out"), files_of(tmp_path / "local")
    assert {k: v for k, v in found.items() if "shard" in k} == {k: v for k, v in local.items() if "shard" in k}
    server.versions["s-001.tar"] = "second"
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--cache", str(tmp_path / "cache")])
    assert "begun from another source (http" in capsys.readouterr().err


def test_a_run_s_data(server: Server, tmp_path: Path) -> None:
    """Complete shards are enough: nothing is fetched for them; those of another URL are refused."""
    data = ImageFolderData(path=f"{server.url}/x.zip", size=8, folder=tmp_path / "out", cache=tmp_path / "cache")
    assert ImageFolderData.model_validate_json(data.model_dump_json()) == data
    assert data.describe().num_classes == 3
    assert Manifest.read(data.prepare()).samples == 11
    assert (data.prepare(), server.requests["x.zip"]) == (tmp_path / "out", 1)
    with pytest.raises(ValueError, match=r"holds the images of http.*x\.zip, data\.path is http.*x\.tar"):
        data.model_copy(update={"path": f"{server.url}/x.tar"}).prepare()
    assert ImageFolderData(path="https://h/train-{000..146}.tar", size=8).shards == Path("data/train-8")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{train-0,val-0}.tar", r"holds several splits \(train, validation\): give one of 'http\S+/train\*\.tar'"),
        ("s-*.tar", "name several files by braces"),
        ("get.tar?file={a,b}", "name several files by braces"),
        ("{x.zip,x.tar}", "several kinds"),
        ("notes.txt", r"http\S+/notes.txt holds no images that can be read. Found: 1 \.txt"),
    ],
)
def test_what_is_refused(name: str, words: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_source(f"{server.url}/{name}", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="http, https, s3, gs, hf, not 'ftp'"):
        open_source("ftp://h/x.tar", cache=tmp_path / "cache")


def test_files_of_one_name_are_not_mixed_up(served: Path, server: Server, tmp_path: Path) -> None:
    """Of two folders, and of two queries."""
    write_files(served, {"x.zip?version=2": zip_of(FILES)})
    urls = [f"{server.url}/x.zip", f"{server.url}/other/x.zip", f"{server.url}/x.zip?version=2"]
    found = {open_source(url, cache=tmp_path / "cache").reader.files for url in urls}
    assert len(found) == 3
    assert server.requests["x.zip"] == 2
