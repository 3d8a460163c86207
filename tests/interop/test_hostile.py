"""Hostile files: each refused with one clear line, none of their code run, little memory, nothing written."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from shortcutflow.cli import main
from shortcutflow.interop.jax_pickle import load_pickle
from tests.interop.hostile_pickles import SIZES, Calls, by_hand, code
from tests.interop.hostile_pickles import main as convert_each
from tests.interop.released_files import checkpoint, dumped, parameters
from tests.processes import run_forked


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a process of its own said to each file; it checks after each that its folder is empty."""
    folder = tmp_path_factory.mktemp("hostile")
    done = run_forked(convert_each, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.iterdir()) == [], "neither a canary nor a result"
    return json.loads(done.stdout)


def test_each_is_refused_with_one_line(outcome: dict) -> None:
    said = outcome["said"]
    assert len(said) >= 500
    assert [name for name, words in said.items() if words is None] == [], "accepted"
    for name, words in said.items():
        assert words.startswith("ValueError: "), (name, words)
        assert len(words.splitlines()) == 1, (name, words)
        assert 20 < len(words) < 700, (name, words)


def test_memory_stays_small(outcome: dict) -> None:
    assert outcome["memory"] < 1e9


def test_calls_are_refused_by_name(outcome: dict) -> None:
    whole = checkpoint(parameters(np.random.default_rng(0), **SIZES), parameters(np.random.default_rng(0), **SIZES))
    for name, _ in code(whole, Path("canary")):
        function = name.partition(" in ")[0].removeprefix("numpy.core.multiarray.")
        assert function in outcome["said"][name], (name, outcome["said"][name])


def test_control(tmp_path: Path) -> None:
    """The same reader takes the file that the hostile ones are made from; Python's unpickler runs what they ask for."""
    rng = np.random.default_rng(0)
    good = tmp_path / "good.pkl"
    good.write_bytes(dumped(checkpoint(parameters(rng, **SIZES), parameters(rng, **SIZES))))
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(good), "--out", str(tmp_path / "out"), "--heads", "2"])
    assert stop.value.code == 0
    (tmp_path / "harmful.pkl").write_bytes(dumped(Calls(os.system, f"touch {tmp_path / 'canary'}")))
    pickle.loads((tmp_path / "harmful.pkl").read_bytes())
    assert (tmp_path / "canary").exists(), "the files do what they claim to do"


@pytest.mark.parametrize("name", ["INST", "a dictionary in itself", "empty"])
def test_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pkl").write_bytes(dict(by_hand(tmp_path / "canary"))[name])
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "bad.pkl"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / 'bad.pkl'}: refused at byte ")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pkl"]


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """Bytes overwritten anywhere near the beginning, where most operations are: read or refused, nothing else."""
    rng = np.random.default_rng(1)
    good = dumped(checkpoint(parameters(rng, **SIZES), parameters(rng, **SIZES)))
    file, refused = tmp_path / "damaged.pkl", []
    for _ in range(300):
        content = bytearray(good)
        for place in rng.integers(0, 400, 3):
            content[place] = int(rng.integers(0, 256))
        file.write_bytes(content)
        try:
            load_pickle(file)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(len(words.splitlines()) == 1 for words in refused)
