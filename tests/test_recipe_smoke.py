"""Every recipe's smoke run goes from shards to samples: on stand-in data, and on data that was really prepared."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shortcutflow.cli import main
from shortcutflow.commands.recipes import load_recipe
from shortcutflow.config import RunConfig
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.source import ShardsData
from shortcutflow.data.stream import ShardStream
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.launch import Options, run_recipe
from shortcutflow.models.model import load
from shortcutflow.run_dir import WEIGHTS_FILE
from shortcutflow.smoke import fake_data_for, smoke, write_images, write_latents
from tests.processes import run_forked, script
from tests.test_recipes import LARGE, PAPER, ROOT, installed

SMOKE = [*LARGE, *(f"{name}_{which}" for name in PAPER for which in ("released", "best"))]
"""Recipes of data that nobody has by default."""
ELSEWHERE = ["digits", "digits_paper", "policy_sequences"]
"""Those that make their own data; their own tests run them."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several, many times so where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_each_recipe_is_run() -> None:
    assert sorted([*SMOKE, *ELSEWHERE]) == installed()


def run(name: str, *overrides: str, resume: bool = False) -> Path:
    folder = run_recipe(
        load_recipe(name), overrides, Options(run_dir=Path("runs") / name, smoke=not resume, resume=resume)
    )
    assert folder is not None
    return folder


def check_trained(folder: Path, steps: int = 4) -> None:
    """Finite losses of both kinds, a grid, weights that moved, and finite samples of the right shape."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    # Fine-tuning begins with a step of flow rows alone.
    assert all(line["loss_bootstrap"] >= 0 for line in lines[1:])
    assert (folder / WEIGHTS_FILE).is_file()
    assert (folder / "grids" / f"step_{steps:08d}.png").is_file()
    loaded = load(folder)
    start = RunConfig.load(folder).build_network().state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in loaded.network.state_dict().items())
    samples = draw(loaded)
    assert samples.shape == (2, *loaded.data.describe().shape)
    assert samples.isfinite().all()


def draw(loaded: Any) -> Tensor:
    return generate(loaded, noise_of(0, 2, loaded.shape), labels_of(2, loaded.num_classes), steps=2)


@pytest.mark.parametrize("name", SMOKE)
def test_smoke_from_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(name)
    kind = "images" if name == "unet_cifar10" else "latents"
    line, *model = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stand-in")]
    assert re.fullmatch(rf"stand-in data: random {kind} in data/smoke-\S+, because data/\S+ is not there", line)
    assert [said.partition(":")[0] for said in model] == ["stand-in start and teacher"] * name.startswith("finetune")
    check_trained(folder)
    config = RunConfig.load(folder)
    assert str(config.data.folder).startswith("data/smoke-")  # type: ignore[union-attr]
    assert config.data.describe().num_classes == (1000 if "imagenet" in name or "sit" in name else None)
    assert config.objective == load_recipe(name).objective, "what is tried is the recipe's own objective"
    assert config.training.parallel == load_recipe(name).training.parallel
    written = {path.name for path in Path("data").iterdir()}
    models = {Path(path).name for path in (config.start, config.teacher) if path is not None}
    assert written == {config.data.folder.name} | models  # type: ignore[union-attr]
    assert len(models) == len(model)


def test_smoke_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("dit_b_celebahq")
    check_trained(run("dit_b_celebahq", "training.steps=6", resume=True), steps=6)


def test_without_smoke_missing_data_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control: random numbers are never trained on by accident, and a dry run writes nothing."""
    monkeypatch.chdir(tmp_path)
    for name, missing in (("dit_b_imagenet", "data/imagenet-256-latents"), ("unet_cifar10", "data/cifar10-train")):
        with pytest.raises(SystemExit, match="2"):
            main(["train", name, "training.device=cpu", "training.compile=false"])
        assert missing in capsys.readouterr().err
        with pytest.raises(SystemExit, match="0"):
            main(["train", name, "--smoke", "--dry-run"])
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.glob("data/smoke-*")) == []


@pytest.mark.parametrize("name", installed())
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_smoke_batch_fits_the_processes(name: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    config = smoke(load_recipe(name))
    batch = config.training.global_batch_size
    assert batch % world == 0
    assert batch <= 8 * world
    n = config.objective.n_bootstrap(batch)  # type: ignore[union-attr]
    assert n >= world
    assert getattr(config.objective, "rows", "each_once") == "each_once" or n % world == 0


def test_two_processes(tmp_path: Path) -> None:
    """The sharded recipe, with both processes in need of stand-in data at once."""
    recipe = ROOT / "recipes" / "dit_xl_imagenet.py"
    done = run_forked(script, tmp_path, recipe, "--smoke", "--run-dir", "run", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stand-in data") == 1
    config = RunConfig.load(tmp_path / "run")
    assert (config.training.parallel, config.training.global_batch_size) == ("fsdp", 8)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["smoke-imagenet-256-latents-labelled"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(np.isfinite(line["loss"]) for line in lines)


# On data that was really prepared


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures of 64x64 in three class folders, in a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "raw" / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path / "raw"


def prepare(*argv: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", *argv, "--workers", "1"])


def test_prepared_latents(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures, autoencoder, shards, training, samples; the latents are of another autoencoder, which must be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that diffusers tries to import
        pytest.importorskip("diffusers")
        from tests.data.test_autoencoder import tiny_network

        tiny_network().save_pretrained(pictures.parent / "tiny-vae")
    folder = "data/imagenet-256-latents"
    prepare(str(pictures), folder, "--size", "64", "--latents", "--vae", "tiny-vae", "--device", "cpu")
    with pytest.raises(ValueError, match=r"latents of '.*/tiny-vae', data\.vae says 'stabilityai/sd-vae-ft-mse'"):
        run("dit_b_imagenet")
    run_dir = run("dit_b_imagenet_released", "data.vae=tiny-vae")
    assert "stand-in" not in capsys.readouterr().out
    check_trained(run_dir)
    config = RunConfig.load(run_dir)
    assert config.data.describe().num_classes == 3
    assert str(config.data.folder) == folder  # type: ignore[union-attr]
    assert config.evaluation is None, "a smoke run fetches no weights"
    with pytest.raises(SystemExit, match="2"):
        main(["train", "dit_b_imagenet", "data.vae=tiny-vae", "--run-dir", "whole"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert "there is no evaluation.reference data/imagenet-256-released-code.npz: shortcutflow evaluate" in lines[-1]
    assert not Path("whole").exists(), "this is said before anything is trained"


def test_prepared_pictures(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(str(pictures), "data/cifar10-32", "--size", "32", "--no-labels")
    with pytest.raises(ValueError, match=r"-32 holds the images of .*raw, data\.path is data/cifar10-train"):
        run("unet_cifar10")
    folder = run("unet_cifar10", f"data.path={pictures}")
    assert "stand-in" not in capsys.readouterr().out
    check_trained(folder)
    assert Manifest.read(Path("data/cifar10-32")).samples == 12


def test_raw_pictures_are_prepared_on_the_way(pictures: Path) -> None:
    """With their classes, as the docstring says how."""
    labelled = ["data.labels=true", "data.folder=data/labelled", "objective.condition_dropout=0.1"]
    folder = run("unet_cifar10", f"data.path={pictures}", *labelled)
    check_trained(folder)
    assert RunConfig.load(folder).data.describe().num_classes == 3


# Stand-in data


def test_stand_in_latents_are_like_real_ones(tmp_path: Path) -> None:
    """Near unit deviation after scaling, mirror images that are mirrored, and another draw at each visit."""
    write_latents(tmp_path / "a", 1000)
    write_latents(tmp_path / "b", 1000)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    plain = ShardStream(tmp_path / "a", batch_size=32, seed=0)
    flipped = ShardStream(tmp_path / "a", batch_size=32, seed=0, horizontal_flip=True)
    first, second, mixed = next(plain), next(plain), next(flipped)
    assert first.data.shape == (32, 4, 32, 32)
    assert 0.8 < first.data.std() < 1.2
    assert first.y is not None
    assert first.y.max() >= 10
    place = {key: i for i, key in enumerate(second.keys)}
    again = torch.stack([second.data[place[key]] for key in first.keys])
    close = (again - first.data).flatten(1).std(dim=1)
    assert (close < 0.05).all()
    assert (close > 0).all()
    mirrored = [i for i in range(32) if (mixed.data[i] - first.data[i]).std() > 0.5]
    assert 4 < len(mixed.keys) - len(mirrored) < 28
    for i in mirrored:
        assert (mixed.data[i].flip(-1) - first.data[i]).std() < 0.05


def test_stand_in_pictures(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "a", 8, 10)
    batch = next(ShardStream(tmp_path / "a", batch_size=32, seed=0))
    assert (manifest.shape, manifest.num_classes, batch.data.shape) == ((3, 8, 8), 10, (32, 3, 8, 8))
    assert batch.y is not None
    assert set(batch.y.tolist()) == set(range(10))


def test_what_has_no_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that is there, a URL, a folder of nobody knows what; and each of them asked twice gives the same."""
    monkeypatch.chdir(tmp_path)
    write_latents(tmp_path / "there", None)
    for data in (
        ShardsData(folder=tmp_path / "there", vae="v"),
        ShardsData(folder="https://example.org/shards", vae="v"),
        ShardsData(folder=tmp_path / "missing"),
        ImageFolderData(path=tmp_path / "there" / "manifest.json" / "inside", size=8),
        load_recipe("digits").data,
        load_recipe("policy_sequences").data,
    ):
        assert fake_data_for(data, labelled=True) is None
    assert not (tmp_path / "data").exists()
    missing = ShardsData(folder=tmp_path / "missing", vae="v", shuffle_buffer=7)
    plain, labelled = (fake_data_for(missing, labelled=labelled) for labelled in (False, True))
    assert plain is not None
    assert labelled is not None
    assert (plain[0].describe().num_classes, labelled[0].describe().num_classes) == (None, 1000)
    assert plain[0].shuffle_buffer == 7
    assert fake_data_for(missing, labelled=False) == plain
    assert fake_data_for(plain[0], labelled=False) is None
