"""Shards that webdataset's own writer made, in the public layouts, are trained on as they are."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from shortcutflow.cli import main
from shortcutflow.data import remote, source
from shortcutflow.data import webdataset as ours
from shortcutflow.data.images import read_image, to_square
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.source import DataInfo
from shortcutflow.data.stream import BatchStream
from shortcutflow.data.webdataset import WebdatasetData, expand
from shortcutflow.evaluation.real_images import open_images
from tests.data.test_remote import Server
from tests.data.test_remote_commands import fake_command
from tests.train.launched import furthest_apart, tensors

webdataset = pytest.importorskip("webdataset")
SAMPLES, PER_SHARD = 23, 7


def photograph(number: int, side: int = 8) -> bytes:
    """A JPEG of one colour by number, wider than high."""
    out = io.BytesIO()
    Image.new("RGB", (side + 4, side), (number * 10, 255 - number * 10, 60)).save(out, "JPEG", quality=100)
    return out.getvalue()


def write(folder: Path, samples: list[dict[str, Any]], per_shard: int = PER_SHARD) -> str:
    """By webdataset's ShardWriter; gives the URL with braces."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "train-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return f"{folder}/train-{{000000..{-(-len(samples) // per_shard) - 1:06d}}}.tar"


def imagenet(count: int = SAMPLES) -> list[dict[str, Any]]:
    """As imagenet-wds has them: ``jpg`` and ``cls``, and more that is not needed."""
    return [
        {"__key__": f"n{i:08d}", "jpg": photograph(i), "cls": i % 5, "json": {"filename": f"{i}.JPEG"}}
        for i in range(count)
    ]


def img2dataset(count: int = SAMPLES) -> list[dict[str, Any]]:
    """As img2dataset writes them: ``jpg``, ``json`` and ``txt``, no class."""
    return [
        {"__key__": f"{i:09d}", "jpg": photograph(i), "txt": f"caption {i}", "json": {"meta": {"label": i % 3}}}
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(urls: str | tuple[str, ...], **options: Any) -> WebdatasetData:
    given: dict[str, Any] = {"size": 4, "workers": 0, "shuffle_buffer": 10, "cache_bytes": 0} | options
    return WebdatasetData(urls=urls, **given)


def batches(data: WebdatasetData, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list[Any]:
    stream: BatchStream = data.open_stream(batch_size=6, seed=1, rank=rank, world_size=world)
    stream.load_state_dict({"samples_seen": start})
    return list(islice(iter(stream.__next__, None), count))


@pytest.mark.parametrize(
    ("samples", "options", "classes"),
    [
        (imagenet(), {}, 5),
        (imagenet(), {"num_classes": 1000}, 1000),
        (img2dataset(), {"label": None}, None),
        (img2dataset(), {"label": "json:meta.label"}, 3),
        ([{"__key__": f"a.b/x{i}", "v1.seg.png": photograph(0), "v1.JPG": photograph(i), "x.cls": i % 2}
          for i in range(SAMPLES)], {"image": "jpg;v1.jpg", "label": "x.cls"}, 2),
    ],
    ids=["imagenet", "given classes", "img2dataset without labels", "img2dataset", "dotted names"],
)  # fmt: skip
def test_each_sample_is_what_webdataset_reads(
    tmp_path: Path, samples: list[dict[str, Any]], options: dict[str, Any], classes: int | None
) -> None:
    """Every sample once an epoch, the pixels those of its decoded file, cropped and resized; the label its member's."""
    data = settings(write(tmp_path / "s", samples), **options)
    assert data.describe() == DataInfo((3, 4, 4), classes)
    label_of = data.label or ""
    there = {}
    for sample in webdataset.WebDataset(sorted(map(str, (tmp_path / "s").glob("*.tar"))), shardshuffle=False):
        label: Any = None
        if label_of.startswith("json:"):
            label = json.loads(sample["json"])["meta"]["label"]
        elif label_of:
            label = int(sample[label_of])
        there[sample["__key__"]] = (sample["jpg" if "jpg" in sample else "v1.jpg"], label)
    assert len(there) == SAMPLES
    seen = {}
    for batch in data.one_epoch():
        for row, key in enumerate(batch.keys[: len(batch.data)]):
            content, label = there[key]
            due = np.moveaxis(np.asarray(to_square(read_image(content), 4, "released")), -1, 0)
            assert torch.equal(batch.data[row], torch.from_numpy(due.copy()).float() / 127.5 - 1)
            assert (batch.y is None and label is None) or int(batch.y[row]) == label
            seen[key] = 1
    assert len(seen) == SAMPLES


def test_shares_and_resume(tmp_path: Path) -> None:
    """One to three processes see the same global batches, each sample once an epoch; any position can be gone to."""
    data = settings(write(tmp_path / "s", imagenet()), horizontal_flip=True)
    whole = batches(data, SAMPLES)
    for epoch in range(6):
        keys = [key for batch in whole for key in batch.keys][epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert len(set(keys)) == SAMPLES
    for world in (2, 3):
        for rank in range(world):
            for share, batch in zip(batches(data, 8, rank=rank, world=world), whole, strict=False):
                assert share.keys == batch.keys[rank::world]
                assert torch.equal(share.data, batch.data[rank::world])
    again = batches(data.model_copy(update={"workers": 2}), 3, start=30)
    assert [batch.keys for batch in again] == [batch.keys for batch in whole[5:8]]
    assert all(torch.equal(a.data, b.data) for a, b in zip(again, whole[5:8], strict=True))


def test_shards_are_indexed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the cache: their folder is not touched. A kill leaves those that are done; a changed shard is indexed anew."""
    urls = write(tmp_path / "s", imagenet())
    scanned: list[str] = []
    scan = ours.scan

    def watched(file: Any, name: str, *fields: Any) -> Any:
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(name)
        return scan(file, name, *fields)

    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    monkeypatch.setattr(ours, "SCAN_THREADS", 1)
    monkeypatch.setattr(ours, "scan", watched)
    with pytest.raises(KeyboardInterrupt):
        settings(urls).opened()
    assert scanned == ["train-000000.tar", "train-000001.tar"]
    monkeypatch.setattr(ours, "scan", lambda file, name, *fields: scanned.append(name) or scan(file, name, *fields))
    expected = batches(settings(urls), 4)
    assert sorted(scanned) == sorted(before)
    after = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert before == after
    assert len(list((tmp_path / "data" / "cache" / "webdataset").glob("*.index"))) == len(before)

    source._OPENED.clear()  # as a new process; whose cache may be read-only, so it takes no lock
    with mock.patch.object(ours, "FileLock", side_effect=PermissionError):
        assert [batch.keys for batch in batches(settings(urls), 4)] == [batch.keys for batch in expected]
    assert len(scanned) == len(before)
    # A shard that is replaced is indexed anew, at the next start; while it is read from, it is noticed.
    stream = settings(urls, on_error="raise").open_stream(batch_size=6, seed=1)
    write(tmp_path / "other", imagenet(1))
    os.replace(tmp_path / "other" / "train-000000.tar", tmp_path / "s" / "train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001\.tar has changed since it was indexed"):
        list(islice(stream, 4))
    assert settings(urls).opened().manifest.samples == SAMPLES - PER_SHARD + 1
    assert scanned[len(before) :] == ["train-000001.tar"]
    assert "train-000001.tar has changed since it was indexed; it is indexed anew" in caplog.text


def test_processes_share_the_indexing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once, each beginning elsewhere: every shard is scanned by one of them, and all get the same."""
    urls = write(tmp_path / "s", imagenet(40), per_shard=2)
    scanned: list[str] = []
    scan = ours.scan
    monkeypatch.setattr(ours, "scan", lambda file, name, *fields: scanned.append(name) or scan(file, name, *fields))
    monkeypatch.setattr(ours, "SCAN_THREADS", 1)
    places = tuple(expand(urls))

    monkeypatch.setattr(ours.Rank, "from_environment", lambda: ours.Rank(int(current_thread().name[-1]), 3))

    def rank(_: int) -> Manifest:
        return ours.WebdatasetShards(settings(urls), places).manifest

    with ThreadPoolExecutor(3, thread_name_prefix="rank") as pool:
        found = list(pool.map(rank, range(3)))
    assert sorted(scanned) == sorted(Path(place).name for place in places)
    assert found[0] == found[1] == found[2]
    assert found[0].samples == 40


def test_what_is_left_out_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = imagenet(12)
    del samples[1]["jpg"], samples[2]["cls"]
    samples[3]["cls"] = b"n01440764"
    samples[4]["cls"] = b"-1"
    samples[5]["cls"] = b"9" * 5000
    urls = write(tmp_path / "s", samples, per_shard=12)
    tar = tmp_path / "s" / "train-000000.tar"
    with tarfile.open(tar, "a") as file:  # another sample of the first one's name, and what no sample is
        for name in ("n00000000.jpg", "n00000000.cls", "._n1.jpg", "__meta__/x.jpg", "no_extension"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    data = settings(urls)
    assert data.opened().manifest.samples == 7
    said = capsys.readouterr().err
    assert said.startswith("7 samples are left out, such as n00000000.jpg (a member of this name comes before it")
    listed = Path(said.strip().rpartition(" ")[2]).read_text().splitlines()
    assert [line.partition("\t")[0] for line in listed] == [
        "n00000000.jpg", "n00000000.cls", *(f"n{i:08d}" for i in (1, 2, 3, 4, 5)),
    ]  # fmt: skip
    reasons = ("no image (jpg;", "no label (cls)", "'n01440764', not a", "its label is -1,", "'9999")
    for line, reason in zip(listed[2:], reasons, strict=True):
        assert reason in line
    with pytest.raises(ValueError, match=r"7 samples are left out.*data\.on_error=skip trains without them"):
        settings(urls, on_error="raise").opened()


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    urls = write(tmp_path / "s", imagenet())
    with pytest.raises(
        ValueError, match=r"train-000000.tar holds the label 4, data\.num_classes=4 takes labels up to 3"
    ):
        settings(urls, num_classes=4).opened()
    with pytest.raises(ValueError, match=r"no sample can be used.*no label \(label\) among its members: cls, jpg"):
        settings(urls, label="label").describe()
    with pytest.raises(ValueError, match=r"no label \(json:a\.b\) among.*data\.label=null trains without"):
        settings(urls, label="json:a.b").describe()


def test_damaged_and_compressed_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cut-off shard gives what lies before the cut, and says so; a compressed one, and a damaged image, are named."""
    urls = write(tmp_path / "s", imagenet())
    tar = tmp_path / "s" / "train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    assert SAMPLES - PER_SHARD < settings(urls).opened().manifest.samples < SAMPLES
    assert "train-000001.tar is damaged or cut off" in capsys.readouterr().err
    tar.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(ValueError, match="compressed by gzip: decompress it"):
        settings(urls).opened()
    tar.write_bytes(whole.replace(photograph(8), b"\xff\xd8\xff" + bytes(len(photograph(8)) - 3)))
    stream = settings(urls).open_stream(batch_size=SAMPLES, seed=0)
    assert len(set(next(stream).keys)) == SAMPLES - 1
    assert "n00000008 (train-000001" in next(iter(stream.damaged))


def test_nothing_runs_code(tmp_path: Path) -> None:
    """Members that webdataset would unpickle are never read, and no URL is a command."""
    trap = tmp_path / "trap"
    payload = f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()
    samples = [sample | {"pyd": payload, "pickle": payload, "pth": payload} for sample in imagenet()]
    batches(settings(write(tmp_path / "s", samples)), 4)
    for urls in (f"pipe:touch {trap}", f"pipe:curl http://x/{trap}", "ftp://host/a.tar", "file:///etc/a.tar"):
        with pytest.raises(ValueError, match="no command is run"):
            settings(urls).opened()
    assert not trap.exists()


def test_lists_and_braces(tmp_path: Path) -> None:
    urls = write(tmp_path / "s", imagenet())
    expected = sorted(str(path) for path in (tmp_path / "s").glob("*.tar"))
    listed = tmp_path / "s" / "shards.txt"
    listed.write_text("# all\ntrain-{000000..000001}.tar\n\ntrain-000002.tar\nhttps://host/{a,b}.tar\n")
    assert expand(str(listed)) == [*expected[:3], "https://host/a.tar", "https://host/b.tar"]
    assert expand(urls) == expand(tuple(expected)) == expand("::".join(expected)) == expected
    with pytest.raises(ValueError, match=r"names .*train-000000\.tar twice"):
        expand((urls, expected[0]))
    with pytest.raises(FileNotFoundError, match=r"train-000004\.tar, which is not there \(6 are missing\)"):
        settings(f"{tmp_path}/s/train-{{000000..000009}}.tar").opened()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    serving = Server(tmp_path / "s")
    yield serving
    serving.close()


def test_shards_of_a_url(tmp_path: Path, server: Server) -> None:
    """The same batches as from the disk, each shard fetched once; a failure is tried again; a change is noticed."""
    local = settings(write(tmp_path / "s", imagenet()))
    urls = f"{server.url}/train-{{000000..000003}}.tar"
    server.answer = lambda name, count, content: (200, content) if count > 1 else (503, b"busy")
    expected = batches(local, 6)
    for _ in range(2):
        found = batches(settings(urls), 6)
        assert [batch.keys for batch in found] == [batch.keys for batch in expected]
        assert all(torch.equal(a.data, b.data) for a, b in zip(found, expected, strict=True))
        assert set(server.requests.values()) == {2}
        source._OPENED.clear()
    write(tmp_path / "s", imagenet(12))
    server.versions["train-000001.tar"] = "other"
    server.requests = Counter()
    assert settings(urls).opened().manifest.samples == SAMPLES - PER_SHARD + 5
    assert set(server.requests) == {"train-000001.tar"}


def test_a_bounded_cache_fetches_the_very_same_again(tmp_path: Path, server: Server) -> None:
    expected = batches(settings(write(tmp_path / "s", imagenet())), 4)
    data = settings(f"{server.url}/train-{{000000..000003}}.tar", cache_limit=1, on_error="raise")
    found = batches(data, 4)
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    assert len(list((tmp_path / "data").rglob("*.tar"))) <= 2  # one is used, one may just be fetched ahead
    # The server does not say that this shard has changed: its checksum does.
    write(tmp_path / "other", imagenet(3))
    for number in range(4):
        os.replace(tmp_path / "other" / "train-000000.tar", tmp_path / "s" / f"train-{number:06d}.tar")
        write(tmp_path / "other", imagenet(3))
    for path in (tmp_path / "data").rglob("*.tar"):
        path.unlink()
    with pytest.raises(OSError, match="do not have the expected checksum"):
        batches(data, 4)


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_buckets_and_the_hub(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own commands and huggingface_hub, whose descriptions of a file tell that it has changed."""
    expected = batches(settings(write(tmp_path / "s", imagenet())), 4)
    found = f'"{tmp_path}/s/${{last##*/}}"'
    last = 'for last in "$@"; do [ "$last" = - ] || url=$last; done; last=$url; '
    fake_command(tmp_path / "bin", "aws", f'{last}[ "$2" = ls ] && stat -c %Y%s {found} || cat {found}')
    fake_command(tmp_path / "bin", "gsutil", f'{last}[ "$1" = ls ] && stat -c %Y%s {found} || cat {found}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    class Hub:
        def info(self, url: str) -> dict[str, Any]:
            there = (tmp_path / "s" / url.rpartition("/")[2]).stat()
            return {"size": there.st_size, "blob_id": str(there.st_mtime_ns)}

        def open(self, url: str, mode: str, block_size: int) -> Any:
            assert (mode, block_size) == ("rb", 0)
            return (tmp_path / "s" / url.rpartition("/")[2]).open("rb")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Hub)
    data = settings(f"{scheme}://owner/folder/train-{{000000..000003}}.tar")
    assert [batch.keys for batch in batches(data, 4)] == [batch.keys for batch in expected]
    write(tmp_path / "s", imagenet(5))
    source._OPENED.clear()
    assert data.opened().manifest.samples == SAMPLES - PER_SHARD + 5


def test_pictures_for_a_reference(tmp_path: Path) -> None:
    data = settings(write(tmp_path / "s", imagenet()))
    pictures = open_images(data.opened())
    assert pictures.count == SAMPLES
    assert {picture.shape for picture in pictures.read(range(SAMPLES))} == {(4, 4, 3)}


def test_a_run_through_the_command_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """From foreign shards to the very same weights, whether the run was killed after a checkpoint or not."""
    urls = write(tmp_path / "s", imagenet())
    run = Path("runs/whole")
    command = ["train", "unet_cifar10", "--smoke", "--run-dir", str(run)]
    data = ["data.kind=webdataset", f"data.urls={urls}", "data.label=null", "data.size=32", "data.workers=0"]
    with pytest.raises(SystemExit, match="0"):
        main([*command, *data, "training.steps=4", "training.checkpoint_every=2", "training.device=cpu"])
    checkpoints = sorted((run / "checkpoints").iterdir())
    whole = tensors(run, 4)
    # A kill after step 2 leaves what was there then.
    shutil.rmtree(checkpoints[-1])
    with pytest.raises(SystemExit, match="0"):
        main(["train", "unet_cifar10", "--run-dir", str(run), "--resume"])
    assert furthest_apart(tensors(run, 4), whole) == 0
