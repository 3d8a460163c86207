"""Whatever folder or file a command is given to write to: what this library did not write stays, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import shortcutflow as sf
from shortcutflow.cli import main
from shortcutflow.data.images import encode_image
from shortcutflow.io.atomic import claim, remove_leftovers, unfinished_name, write_whole

SMALL = ["--smoke", "backbone.options.width=16", "backbone.options.depth=1", "training.grid_steps=[1]"]
FOREIGN = ("photo.png", "notes.txt", ".hidden", "album/2019/photo.png", "model.safetensors", "model.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a model of it, pictures to prepare and finished shards."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        power = 'emas.wide={"sigma_rel":0.05,"snapshot_every":2}'
        succeed("train", "digits", "--run-dir", "run", power, *SMALL)
        sf.load("run").save(Path("model"))
        for label in "ab":
            (home / "raw" / label).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((8, 8, 3), 20 * i, dtype=np.uint8)
                (home / "raw" / label / f"{i}.png").write_bytes(encode_image(Image.fromarray(pixels), "png", 95))
        succeed("prepare", "raw", "shards", "--size", "8", "--workers", "1")
    return home


def succeed(*argv: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def foreign_folder(place: Path) -> Path:
    for name in FOREIGN:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(f"not of this library: {name}".encode())
    (place / "empty").mkdir()
    return place


REFUSED = {
    "digits data.folder": ["train", "digits", "data.folder=FOLDER", "--run-dir", "new", *SMALL],
    "pusht data.folder": ["train", "policy_sequences", "data.folder=FOLDER", "--run-dir", "new", "training.steps=1"],
    "images data.folder": [
        "train", "digits", 'data={"kind":"imagefolder","path":"raw","size":8,"folder":"FOLDER"}', "evaluation=null",
        "--run-dir", "new", *SMALL,
    ],
    "shards data.folder": [
        "train", "digits", 'data={"kind":"shards","folder":"FOLDER"}', "evaluation=null", "--run-dir", "new", *SMALL,
    ],
    "train --run-dir": ["train", "digits", "--run-dir", "FOLDER", *SMALL],
    "train --resume": ["train", "digits", "--run-dir", "FOLDER", "--resume", *SMALL],
    "prepare FOLDER": ["prepare", "raw", "FOLDER", "--size", "8", "--workers", "1"],
    "sample --out": ["sample", "run", "--steps", "1", "--out", "FOLDER/photo.png"],
    "average --out": ["average", "run", "--sigma-rel", "0.05", "--out", "FOLDER/model.safetensors"],
    "convert --out": ["convert", "model", "--out", "FOLDER"],
    "export --out, a file": ["export", "model", "--format", "torch", "--out", "FOLDER/notes.txt"],
    "export --out, a folder": ["export", "model", "--format", "diffusers", "--out", "FOLDER"],
    "plot --out": ["plot", "trajectory", "run", "--steps", "1", "--out", "FOLDER/photo.png"],
    "plot quality --out": ["plot", "quality", "run", "--out", "FOLDER/photo.png"],
    "evaluate --out": [
        "evaluate", "run", "--protocol", "digits", "--steps", "1", "--samples", "8", "--out", "FOLDER/model.json",
    ],
    "evaluate --save-images": [
        "evaluate", "run", "--protocol", "digits", "--steps", "1", "--samples", "8", "--out", "report.json",
        "--save-images", "FOLDER/..",
    ],
    "make-stats --out": [
        "evaluate", "--make-stats", "raw", "--protocol", "digits", "--size", "8", "--out", "FOLDER/model.npz",
    ],
}  # fmt: skip


@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED)
def test_a_command_leaves_what_is_not_its_own(
    argv: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command refuses in one line that names the place, before it has changed anything in it."""
    monkeypatch.chdir(home)
    folder = foreign_folder(tmp_path / "steps-1")  # the name that --save-images looks for
    before, names = contents(folder), sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([word.replace("FOLDER", str(folder)) for word in argv])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert "steps-1" in said
    assert contents(folder) == before
    assert sorted(folder.rglob("*")) == names


def test_what_the_library_wrote_is_written_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for _ in range(2):
        succeed("sample", "run", "--steps", "1", "--out", str(tmp_path / "a.png"))
        succeed("plot", "quality", "run", "--out", str(tmp_path / "q.svg"))
        succeed("average", "run", "--sigma-rel", "0.05", "--out", str(tmp_path / "w.safetensors"))
        claim(tmp_path / "pictures")
        (tmp_path / "pictures" / "0.png").touch()
    sf.load("model").save(Path("model"))
    with pytest.raises(FileExistsError, match="exists already, and holds"):
        sf.load("model").save(foreign_folder(tmp_path / "others"))


def test_unfinished_files_of_dead_processes_alone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = unfinished_name(tmp_path / "x.tar")
    assert ours != unfinished_name(tmp_path / "x.tar")
    dead = tmp_path / ours.name.replace(f"-{_pid(ours)}-", "-999999999-")
    elsewhere = tmp_path / dead.name.replace("unfinished-", "unfinished-other.")
    others = tmp_path / ".x.tar.unfinished-1234"
    for path in (ours, dead, elsewhere, others):
        path.touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ours.name, elsewhere.name, others.name}
    remove_leftovers(tmp_path, of_all=True)
    assert [path.name for path in tmp_path.iterdir()] == [others.name]


def _pid(path: Path) -> str:
    return path.name.rsplit("-", 2)[1]


@pytest.mark.parametrize(
    ("file", "content", "argv", "says"),
    [
        ("config.json", "", ["show-config", "RUN"], "config.json, which describes a run, is empty: restore it"),
        ("config.json", '{"name": "di', ["show-config", "RUN"], r"is not JSON, or cut off \(.*restore it"),
        (
            "state.json",
            "",
            ["sample", "RUN"],
            "describes a checkpoint, is empty: remove this checkpoint's folder",
        ),
    ],
)
def test_a_damaged_json_file_is_named(
    file: str, content: str, argv: list[str], says: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re
    import shutil

    run = Path(shutil.copytree(home / "run", tmp_path / "run"))
    damaged = sorted(run.rglob(file))[-1]
    write_whole(damaged, content)
    for weights in run.glob("weights.safetensors"):
        weights.unlink()
    with pytest.raises(SystemExit) as stop:
        main([word.replace("RUN", str(run)) for word in argv])
    assert stop.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_damaged_tensor_file_is_named(home: Path, tmp_path: Path) -> None:
    sf.load(home / "model").save(tmp_path / "model")
    path = next((tmp_path / "model").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"\.safetensors is no safetensors file, or damaged .*get it again"):
        sf.load(tmp_path / "model")
    assert torch.is_tensor(next(sf.load(home / "model").network.parameters()))
