"""Shards from elsewhere: the same batches, each file fetched once, failures retried and then named."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from itertools import islice
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Thread

import numpy as np
import pytest
import torch

from shortcutflow.data import remote
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.remote import ReadError, cached_path, local_copy
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.data.stream import ShardStream
from tests.data.test_damage import flip_byte, place_of, restate
from tests.data.test_stream import write_numbers

Answer = Callable[[str, int, bytes], tuple[int, bytes]]
"""From a file's name, how often it was asked for (from 1) and its content: status and content that are sent.

The length that is announced is that of the whole content, so what is shorter was cut off.
"""


class Server:
    """Serves a folder, counts the requests and answers wrongly where it is told to."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.answer: Answer = lambda name, count, content: (200, content)
        self.versions: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("ETag", outer.versions.get(self.path.rpartition("/")[2], "first"))
                self.end_headers()

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                outer.requests[name] += 1
                whole = (folder / name).read_bytes()
                status, content = outer.answer(name, outer.requests[name], whole)
                self.send_response(status)
                self.send_header("Content-Length", str(len(whole) if status == 200 else len(content)))
                self.end_headers()
                with suppress(ConnectionError):  # who has heard enough hangs up
                    self.wfile.write(content)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        # Not http.server's own, which asks the network for this machine's name.
        self._server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/data"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "served")
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    serving = Server(folder)
    yield serving
    serving.close()


def open_remote(url: str, cache: Path, cache_limit: int | None = None, **options: object) -> ShardStream:
    folder = ShardFolder(url, cache=cache, cache_limit=cache_limit)
    return ShardStream(folder, batch_size=8, seed=0, shuffle_buffer=15, workers=0, **options)  # type: ignore[arg-type]


def test_the_same_batches_as_from_here(folder: Path, server: Server, tmp_path: Path) -> None:
    """And each file is asked for once, in two epochs and by a second stream; only the manifest is read anew."""
    local = ShardStream(folder, batch_size=8, seed=0, shuffle_buffer=15)
    for again in range(2):
        stream = open_remote(server.url + "/", tmp_path / "cache")
        local.load_state_dict({"samples_seen": 0})
        for a, b in islice(zip(stream, local, strict=True), 14):
            assert a.keys == b.keys
            assert torch.equal(a.data, b.data)
        assert server.requests.pop("manifest.json") == 1
        assert set(server.requests) == {file.name for file in folder.iterdir()} - {"manifest.json"}
        assert set(server.requests.values()) == {1}, f"run {again}"


def test_settings_lead_to_it(server: Server, tmp_path: Path) -> None:
    data = ShardsData(folder=server.url, cache=tmp_path / "cache", workers=0)
    assert data.describe().shape == (1, 2, 2)
    assert next(data.open_stream(batch_size=5, seed=0)).data.shape == (5, 1, 2, 2)
    assert isinstance(ShardsData.model_validate_json(data.model_dump_json()).folder, str)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "wrong",
    [lambda content: (500, b"sorry"), lambda content: (200, cut(content)), lambda content: (404, b"not yet")],
    ids=["error 500", "cut off", "error 404"],
)
def test_failures_are_retried(
    folder: Path, server: Server, tmp_path: Path, wrong: Callable[[bytes], tuple[int, bytes]]
) -> None:
    """The first two requests for each file fail; what comes in the end is right."""
    server.answer = lambda name, count, content: wrong(content) if count <= 2 else (200, content)
    stream = open_remote(server.url, tmp_path / "cache", on_error="raise")
    local = ShardStream(folder, batch_size=8, seed=0, shuffle_buffer=15)
    assert [batch.keys for batch in islice(stream, 7)] == [batch.keys for batch in islice(local, 7)]
    assert server.requests["manifest.json"] == 3
    assert set(server.requests.values()) == {3}


def same_length_other_content(name: str, count: int, content: bytes) -> tuple[int, bytes]:
    return 200, content if not name.endswith(".tar") else content[:-1] + b"x"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda name, count, content: (500 if name.endswith(".tar") else 200, content), "500"),
        (lambda name, count, content: (200, cut(content) if name.endswith(".tar") else content), "closed|transfer"),
        (same_length_other_content, "do not have the expected checksum"),
    ],
    ids=["error 500", "cut off", "other content"],
)
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_lasting_failures_stop_the_run(
    server: Server, tmp_path: Path, answer: Answer, says: str, on_error: str
) -> None:
    """A network that is down is no damaged sample: no data is skipped for it."""
    server.answer = answer
    stream = open_remote(server.url, tmp_path / "cache", on_error=on_error)
    with pytest.raises(OSError, match=rf"{server.url}/shard-\d+\.tar could not be fetched in 5 tries: .*({says})"):
        next(stream)
    assert not stream.damaged
    assert not list((tmp_path / "cache").rglob("*.tar")), "nothing wrong is kept"
    server.answer = lambda name, count, content: (200, content)
    assert len(next(open_remote(server.url, tmp_path / "cache")).keys) == 8


def test_no_manifest_there(server: Server, tmp_path: Path) -> None:
    server.answer = lambda name, count, content: (404, b"")
    with pytest.raises(ReadError, match=rf"{server.url}/manifest\.json could not be fetched in 5 tries: .*404"):
        open_remote(server.url, tmp_path / "cache")
    assert server.requests["manifest.json"] == 5


def test_no_server(server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(OSError, match=r"could not be fetched in 5 tries: .*onnect"):
        open_remote(server.url, tmp_path / "cache")


def test_worker_processes_name_the_url_too(server: Server, tmp_path: Path) -> None:
    server.answer = lambda name, count, content: (500 if name.endswith(".tar") else 200, content)
    stream = ShardStream(ShardFolder(server.url, cache=tmp_path / "cache"), batch_size=8, seed=0, workers=1)
    with pytest.raises(ReadError, match=r"http://127.*shard-\d+\.tar could not be fetched in 5 tries"):
        next(stream)


def test_more_than_the_manifest_says_is_not_kept(server: Server, folder: Path, tmp_path: Path) -> None:
    """A file that does not end fills no disk."""
    (folder / "shard-000000.tar").write_bytes(b"x" * 5_000_000)
    shards = ShardFolder(server.url, cache=tmp_path / "cache")
    entry = shards.manifest.shards[0]
    with pytest.raises(ReadError, match=rf"more than the {entry.bytes} bytes"):
        shards.path_of(entry)
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 2**21


def test_damage_in_the_cache_is_noticed(server: Server, tmp_path: Path) -> None:
    stream = open_remote(server.url, tmp_path / "cache", cache_bytes=0)
    list(islice(stream, 7))
    (kept,) = (tmp_path / "cache").rglob("shard-000002-*.tar")
    flip_byte(kept, place_of(tmp_path / "served", 2, 3))
    again = open_remote(server.url, tmp_path / "cache", cache_bytes=0)
    list(islice(again, 7))
    assert [name.split()[0] for name in again.damaged] == ["n023"]


def test_new_data_under_an_old_name(server: Server, folder: Path, tmp_path: Path) -> None:
    """The cache does not hand out what the URL held before."""
    next(open_remote(server.url, tmp_path / "cache"))
    new = [Sample(np.full((1, 2, 2), 9, np.uint8), None, f"new{i}") for i in range(24)]
    write_shards(new, folder, samples_per_shard=10, preprocessing="none")
    stream = open_remote(server.url, tmp_path / "cache", on_error="raise")
    assert {key for batch in islice(stream, 3) for key in batch.keys} == {sample.key for sample in new}


def test_what_was_not_used_for_longest_makes_room(server: Server, folder: Path, tmp_path: Path) -> None:
    size = Manifest.read(folder).shards[0].bytes
    shards = ShardFolder(server.url, cache=tmp_path / "cache", cache_limit=3 * size)

    def kept() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in (tmp_path / "cache").rglob("*.tar"))

    def use(number: int) -> None:
        path = shards.path_of(shards.manifest.shards[number])
        now = time.time_ns() + number  # told apart even where the clock is coarse
        assert path.stat().st_size == size
        os.utime(path, ns=(now, now))
        time.sleep(0.01)

    for number in (0, 1, 2):
        use(number)
    assert kept() == [0, 1, 2]
    use(0)
    use(3)
    assert kept() == [0, 2, 3], "1 was not used for longest"
    use(4)
    assert kept() == [0, 3, 4]
    assert server.requests["shard-000000.tar"] == 1
    use(1)
    assert server.requests["shard-000001.tar"] == 2, "what was deleted is fetched again"
    unlimited = ShardFolder(server.url, cache=tmp_path / "all")
    for entry in unlimited.manifest.shards:
        unlimited.path_of(entry)
    assert len(list((tmp_path / "all").rglob("*.tar"))) == 6


def test_a_cache_smaller_than_a_shard_still_works(server: Server, folder: Path, tmp_path: Path) -> None:
    stream = open_remote(server.url, tmp_path / "cache", cache_limit=1, cache_bytes=0, on_error="raise")
    local = ShardStream(folder, batch_size=8, seed=0, shuffle_buffer=15)
    assert [batch.keys for batch in islice(stream, 20)] == [batch.keys for batch in islice(local, 20)]


def fetch_all(url: str, cache: Path) -> None:
    shards = ShardFolder(url, cache=cache)
    for entry in shards.manifest.shards:
        assert shards.path_of(entry).stat().st_size == entry.bytes
        assert shards.index_of(entry).is_file()


def test_processes_of_a_machine_share_the_cache(server: Server, tmp_path: Path) -> None:
    """Three begin at once on a slow server; each file comes once."""

    def slowly(name: str, count: int, content: bytes) -> tuple[int, bytes]:
        time.sleep(0.05)
        return 200, content

    server.answer = slowly
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch_all, args=(server.url, tmp_path / "cache")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests.pop("manifest.json") == 3
    assert len(server.requests) == 12
    assert set(server.requests.values()) == {1}


def test_fetching_ahead_returns_at_once_and_is_used(server: Server, tmp_path: Path) -> None:
    def slowly(name: str, count: int, content: bytes) -> tuple[int, bytes]:
        time.sleep(0.2)
        return 200, content

    shards = ShardFolder(server.url, cache=tmp_path / "cache")
    server.answer = slowly
    entries = list(shards.manifest.shards[:2])
    start = time.monotonic()
    shards.fetch_ahead(entries)
    shards.fetch_ahead(entries)
    assert time.monotonic() - start < 0.2
    for entry in entries:
        shards.path_of(entry)
    assert server.requests["shard-000000.tar"] == server.requests["shard-000001.tar"] == 1


def test_a_stopped_manifest_is_refused(server: Server, folder: Path, tmp_path: Path) -> None:
    restate(folder, 0, name="../x.tar")
    with pytest.raises(ValueError, match=rf"{server.url}/manifest\.json is not a valid manifest: .*plain file name"):
        open_remote(server.url, tmp_path / "cache")


def test_passwords_stay_out_of_folder_names(server: Server, tmp_path: Path) -> None:
    url = server.url.replace("127.0.0.1", "user:secret@127.0.0.1")
    next(open_remote(url, tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if "secret" in str(path)]


def test_a_single_file_is_copied_once_and_anew_when_it_changes(server: Server, folder: Path, tmp_path: Path) -> None:
    """What ``prepare URL`` uses: the copy keeps the file's suffix, and a query or a strange name is no trouble."""
    content = (folder / "shard-000000.tar").read_bytes()
    path = local_copy(f"{server.url}/shard-000000.tar", tmp_path / "cache")
    assert path.suffix == ".tar"
    assert path.read_bytes() == content
    assert local_copy(f"{server.url}/shard-000000.tar", tmp_path / "cache") == path
    assert server.requests["shard-000000.tar"] == 1
    (folder / "shard-000000.tar").write_bytes(b"new")
    server.versions["shard-000000.tar"] = "second"
    assert local_copy(f"{server.url}/shard-000000.tar", tmp_path / "cache").read_bytes() == b"new"
    assert cached_path("https://h/a/x y.zip?b=1", tmp_path, "") != cached_path("https://h/a/x_y.zip?b=1", tmp_path, "")
    assert cached_path("https://h/a/..?b=1", tmp_path, "").resolve().is_relative_to(tmp_path.resolve())
    with pytest.raises(ReadError, match=r"shard-000001\.tar could not be fetched in 5 tries: .*expected checksum"):
        local_copy(f"{server.url}/shard-000001.tar", tmp_path / "cache", sha256="0" * 64)
