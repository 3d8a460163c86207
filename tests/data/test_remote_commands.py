"""URLs and the commands that fetch them: buckets, kinds that are refused, and URLs that try to be commands."""

from __future__ import annotations

import os
import stat
import sys
from itertools import islice
from pathlib import Path

import pytest

from shortcutflow.data import remote
from shortcutflow.data.remote import ReadError, is_url
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.source import ShardsData
from shortcutflow.data.stream import ShardStream
from tests.data.test_remote import open_remote
from tests.data.test_stream import write_numbers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "served")
    return tmp_path / "served"


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "file:///etc", "pipe:cat http://host/x", "HTTP://host/x", "://x"],
)
def test_other_urls_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="files are local or have a URL of http, https, s3, gs, hf, not"):
        ShardFolder(url, cache=tmp_path)
    with pytest.raises(ValueError, match="files are local or have"):
        ShardsData(folder=url)


def test_a_pipe_is_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_url("pipe:touch trap")
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        ShardFolder("pipe:touch trap", cache=tmp_path)
    assert not (tmp_path / "trap").exists()


def fake_command(folder: Path, name: str, body: str) -> None:
    """A command that finds the files of its URL in a folder, and writes down how it was called."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\nfor word in \"$@\"; do printf '%s\\n' \"$word\" >> '{folder}/calls'; done\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``aws s3 cp --only-show-errors URL -`` and ``gsutil cat URL`` for URLs whose last part is a served file."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    bin_folder = tmp_path / "bin"
    fake_command(bin_folder, "aws", f'[ "$1 $2 $3 $5" = "s3 cp --only-show-errors -" ] && cat "{folder}/${{4##*/}}"')
    fake_command(bin_folder, "gsutil", f'[ "$1" = cat ] && cat "{folder}/${{2##*/}}"')
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    return bin_folder


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_buckets(commands: Path, folder: Path, tmp_path: Path, scheme: str) -> None:
    stream = open_remote(f"{scheme}://bucket/some/where", tmp_path / "cache", on_error="raise")
    local = ShardStream(folder, batch_size=8, seed=0, shuffle_buffer=15)
    assert [batch.keys for batch in islice(stream, 7)] == [batch.keys for batch in islice(local, 7)]
    assert f"{scheme}://bucket/some/where/shard-000003.index" in (commands / "calls").read_text().splitlines()


def test_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def open(self, url: str, mode: str, block_size: int) -> object:
            assert url.startswith("hf://datasets/owner/name/")
            return (folder / url.rpartition("/")[2]).open("rb")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Hub)
    stream = open_remote("hf://datasets/owner/name", tmp_path / "cache", on_error="raise")
    local = ShardStream(folder, batch_size=8, seed=0, shuffle_buffer=15)
    assert [batch.keys for batch in islice(stream, 7)] == [batch.keys for batch in islice(local, 7)]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ReadError, match=r"hf:// needs huggingface_hub: pip install 'shortcutflow\[hub\]'"):
        open_remote("hf://datasets/owner/name", tmp_path / "other")


@pytest.mark.parametrize("scheme", ["s3", "gs", "http"])
@pytest.mark.parametrize(
    "hostile",
    [
        "a'; touch TRAP; '", '"; touch TRAP; "', "$(touch TRAP)", "`touch TRAP`", "a | touch TRAP", "a\ntouch TRAP\n",
        "-o TRAP",
    ],
    ids=["quote", "double quote", "substitution", "backticks", "pipe", "new line", "option"],
)  # fmt: skip
def test_a_url_is_never_a_command(
    commands: Path, tmp_path: Path, scheme: str, hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to the command as one word, whatever stands in it."""
    monkeypatch.chdir(tmp_path)
    base = "http://127.0.0.1:9" if scheme == "http" else f"{scheme}://bucket"
    url = f"{base}/{hostile.replace('TRAP', 'trap')}"
    try:
        next(open_remote(url, tmp_path / "cache"))
    except (OSError, ValueError):
        assert scheme == "http", "nothing listens there, and curl refuses some; the others take any word"
    assert not list(tmp_path.rglob("trap"))
    if scheme != "http":
        assert f"{url}/manifest.json\n" in (commands / "calls").read_text()


def test_a_missing_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReadError, match="by the command 'aws', which is not installed"):
        open_remote("s3://bucket/x", tmp_path / "cache")


def test_a_failing_command_says_why(commands: Path, tmp_path: Path) -> None:
    fake_command(commands, "aws", "echo 'access denied' >&2; exit 3")
    with pytest.raises(ReadError, match=r"s3://bucket/x/manifest\.json could not be fetched in 5 tries: access denied"):
        open_remote("s3://bucket/x", tmp_path / "cache")
