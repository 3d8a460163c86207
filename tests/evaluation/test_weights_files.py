"""Weights are found, fetched once and checked; what is missing is told with its place, its source and its checksum."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shortcutflow.data import remote
from shortcutflow.evaluation.features.inception import INCEPTION
from shortcutflow.evaluation.features.protocols import open_protocol
from shortcutflow.evaluation.features.weights_files import PublishedFile, cache_folder, weights_of

CONTENT = b"weights of a network" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHORTCUTFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    return tmp_path / "cache"


class Handler(BaseHTTPRequestHandler):
    """/good, /cut (fewer bytes than it states) and /endless (states nothing)."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100] if self.path == "/cut" else CONTENT)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def published(url: str = "http://127.0.0.1:9/none", **changes: Any) -> PublishedFile:
    values = {"name": "w.pt", "url": url, "publisher": "somebody", "sha256": SHA256, "largest": 10**6} | changes
    return PublishedFile(**values)


def test_fetched_once_and_kept(server: tuple[str, list[str]], cache: Path) -> None:
    url, asked = server
    results: list[bytes] = []
    file = published(f"{url}/good")
    threads = [threading.Thread(target=lambda: results.append(weights_of(file).content)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 3
    assert asked == ["/good"]
    assert weights_of(file).sha256 == SHA256
    assert asked == ["/good"]
    (cache / "w.pt").write_bytes(CONTENT)
    assert weights_of(file).path == cache / "w.pt", "a file that was put there by hand comes first"


@pytest.mark.parametrize(
    ("path", "changes", "says"),
    [
        ("/good", {"sha256": "0" * 64}, "do not have the expected checksum"),
        ("/cut", {}, "could not be fetched"),
        ("/good", {"largest": 5000}, "more than the 5000 bytes that are expected"),
        ("/endless", {"largest": 5000}, "more than the 5000 bytes that are expected"),
    ],
    ids=["another", "cut", "large", "endless"],
)
def test_what_is_not_the_file_is_not_kept(
    path: str, changes: dict[str, Any], says: str, server: tuple[str, list[str]], cache: Path
) -> None:
    with pytest.raises(OSError, match=says):
        weights_of(published(server[0] + path, **changes))
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.parametrize("protocol", ["clean-fid", "released-code", "adm", "dinov2"])
def test_missing_weights_and_no_network(protocol: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("shortcutflow.evaluation.features.weights_files.local_copy", no_network)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(OSError, match="could not be fetched") as caught:
        open_protocol(protocol)
    said = str(caught.value)
    assert "\n" not in said
    name = "dinov2-vit-large-patch14.safetensors" if protocol == "dinov2" else "inception-2015-12-05.pt"
    for part in (f"not at {cache / name} ", "no network", "put the file there by hand", "https://", "SHA-256"):
        assert part in said
    assert (INCEPTION.sha256 in said) == (protocol != "dinov2")


def test_a_wrong_file_in_the_cache(cache: Path) -> None:
    cache.mkdir()
    (cache / "w.pt").write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match=r"is not the published file: its SHA-256 is .* delete it"):
        weights_of(published())
    assert weights_of(published(sha256=None)).content == CONTENT[1:]


def test_another_programs_copy_needs_the_checksum(tmp_path: Path, cache: Path) -> None:
    elsewhere = tmp_path / "other.pt"
    elsewhere.write_bytes(CONTENT)
    assert weights_of(published(also_at=elsewhere)).path == elsewhere
    for sha256 in (None, "0" * 64):
        with pytest.raises(OSError, match="could not be fetched"):
            weights_of(published(also_at=elsewhere, sha256=sha256))
    assert not (cache / "w.pt").exists()


def test_a_given_file_may_be_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "mine.pt"
    mine.write_bytes(b"mine")
    with caplog.at_level(logging.WARNING):
        held = weights_of(published(), mine)
    assert held.sha256 == hashlib.sha256(b"mine").hexdigest()
    assert "compares only with itself" in caplog.text
    with pytest.raises(FileNotFoundError, match="there is no file"):
        weights_of(published(), tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="has 4 bytes; a file of weights of at most 3"):
        weights_of(published(largest=3), mine)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("SHORTCUTFLOW_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "shortcutflow"
