"""Latents from pictures: right numbers, kept through kills, shared among processes, refused when they do not fit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shortcutflow.cli import main
from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.data.latents import encode_images
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.prepare import prepare
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Sample
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.readers import RawSource
from shortcutflow.data.stream import ShardStream
from shortcutflow.distributed import Rank
from tests.data.test_autoencoder import tiny_network

OPTIONS: dict[str, Any] = {
    "size": 8, "crop": "none", "samples_per_shard": 7, "batch_size": 3, "workers": 0,
    "device": "cpu", "progress": False,
}  # fmt: skip
COUNT = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in another order have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    tiny_network().save_pretrained(folder)
    return folder


def picture(number: int) -> np.ndarray:
    """Pixels (3, 8, 8) uint8."""
    return np.random.default_rng(number).integers(0, 256, (3, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small pictures in three class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.moveaxis(picture(number), 0, -1)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def prepared(pictures: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "latents"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    prepare(pictures, folder, vae=vae, **OPTIONS)
    torch.set_num_threads(before)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which may stay."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".lock")}


def reader_of(folder: Path) -> ShardFolder:
    return ShardFolder(folder)


def start(source: Path, folder: Path, vae: Path, *, killed_at: int = 0, **environment: str) -> BaseProcess:
    """The preparation in a process of its own; killed as by ``kill -9`` at one of its calls of the encoder."""
    # A fork has all modules loaded already, which otherwise takes most of the time.
    arguments = (source, folder, vae, killed_at, environment)
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
    process.start()
    return process


def _run(source: Path, folder: Path, vae: Path, killed_at: int, environment: dict[str, str]) -> None:
    encode, calls = Autoencoder.encode, []

    def encode_until_killed(self: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, pixels)

    Autoencoder.encode = encode_until_killed  # type: ignore[method-assign]
    os.environ.update(environment)
    prepare(source, folder, vae=vae, **OPTIONS)


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_manifest_says_how_they_were_made(prepared: Path, vae: Path) -> None:
    manifest = Manifest.read(prepared)
    assert (manifest.values, manifest.format, manifest.shape) == ("moments", "npy", (4, 4, 4))
    assert [shard.samples for shard in manifest.shards] == [7, 7, 6]
    assert (manifest.num_classes, manifest.class_names) == (3, ("class0", "class1", "class2"))
    assert manifest.latents is not None
    assert manifest.latents.model_dump() == {
        "vae": str(vae), "sha256": load_autoencoder(vae).sha256, "scaling_factor": 0.18215, "shift_factor": 0.0,
        "mirrored": True,
    }  # fmt: skip
    assert not {"vae", "folder"} & manifest.settings.keys(), "the weights decide, wherever they lie"


def test_each_picture_and_its_mirror_image(prepared: Path, vae: Path) -> None:
    """Every picture once, with its label, as encoded one at a time, to the half of a float16 step."""
    autoencoder, reader, seen = load_autoencoder(vae), reader_of(prepared), set()
    for shard, entry in enumerate(reader.manifest.shards):
        for number in range(entry.samples):
            sample, mirrored = (reader.read(shard, number, copy=copy) for copy in (0, 1))
            which = int(Path(sample.key).stem)
            seen.add(which)
            assert sample.y == which % 3
            image = torch.from_numpy(picture(which))[None].float() / 127.5 - 1
            for found, expected in ((sample, image), (mirrored, image.flip(-1))):
                exact = autoencoder.encode(expected)[0]
                torch.testing.assert_close(torch.tensor(found.data).float(), exact, rtol=2**-10, atol=2e-6)
            turned = np.flip(sample.data.astype(np.float32), -1)
            assert np.abs(turned - mirrored.data).max() > 1e-3, "the mirrored latent is not the latent of the mirror"
    assert seen == set(range(COUNT))


def test_each_sample_is_a_member(prepared: Path) -> None:
    """Moments of image and mirror image as one array, beside the label: as webdataset reads any other sample."""
    webdataset = pytest.importorskip("webdataset")
    reader = reader_of(prepared)
    found = list(webdataset.WebDataset(str(prepared / "shard-000001.tar"), shardshuffle=False).decode())
    assert len(found) == 7
    for number, sample in enumerate(found):
        expected = [reader.read(1, number, copy=copy) for copy in (0, 1)]
        assert np.array_equal(sample["npy"], np.stack([one.data for one in expected]))
        assert (sample["cls"], Path(expected[0].key).stem) == (expected[0].y, sample["__key__"].partition("-")[2])


def test_training_reads_them(prepared: Path) -> None:
    stream = ShardStream(prepared, batch_size=COUNT, seed=0, horizontal_flip=True)
    first, second = next(stream), next(stream)
    assert first.data.shape == (COUNT, 4, 4, 4)
    assert first.data.dtype == torch.float32
    assert len(set(first.keys)) == COUNT
    again = second.keys.index(first.keys[0])
    assert (second.data[again] - first.data[0]).abs().max() > 0.01, "another draw at each visit"


def test_without_mirror_images(pictures: Path, vae: Path, tmp_path: Path, prepared: Path) -> None:
    manifest = prepare(pictures, tmp_path / "out", vae=vae, mirror=False, **OPTIONS)
    assert manifest.latents is not None
    assert not manifest.latents.mirrored
    reader, both = (reader_of(folder) for folder in (tmp_path / "out", prepared))
    assert np.array_equal(reader.read(1, 3).data, both.read(1, 3).data)
    with pytest.raises(ValueError, match="is out of bounds"):
        reader.read(1, 3, copy=1)


def test_a_complete_folder_is_left_alone(prepared: Path, pictures: Path, vae: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare(pictures, prepared, vae=vae, **OPTIONS) == Manifest.read(prepared)
    for path, written in before.items():
        assert path.name.startswith(".lock") or path.stat().st_mtime_ns == written


def test_killed_and_started_again(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    """Killed in the first, second and third shard: the same bytes as without, and whole shards are not made again."""
    # Three batches a shard (two in the last), two copies each: calls 1-6, 7-12 and 13-16 of the encoder.
    folders = {killed_at: tmp_path / str(killed_at) for killed_at in (1, 5, 9, 12, 16)}
    processes = [start(pictures, folder, vae, killed_at=at) for at, folder in folders.items()]
    assert exit_codes(processes) == [-signal.SIGKILL] * len(folders)
    for killed_at, folder in folders.items():
        whole = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.index")}
        assert len(whole) == (killed_at - 1) // 6
        assert not (folder / "manifest.json").exists()
        assert contents(folder) != contents(prepared)
        prepare(pictures, folder, vae=vae, **OPTIONS)
        assert contents(folder) == contents(prepared)
        assert all((folder / name).stat().st_mtime_ns == written for name, written in whole.items())


def test_several_processes_share_the_work(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    """Two and three ranks write what one writes; each at least one shard."""
    folders = {world: tmp_path / str(world) for world in (2, 3)}
    processes = [
        start(pictures, folder, vae, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        for world, folder in folders.items()
        for rank in range(world)
    ]
    assert exit_codes(processes) == [0] * 5
    for folder in folders.values():
        assert contents(folder) == contents(prepared)


def test_a_killed_rank_s_share_is_made_by_the_others(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in a shard and leaves it unfinished, rank 2 never comes: rank 0 makes all that is missing."""
    folder = tmp_path / "out"
    assert exit_codes([start(pictures, folder, vae, killed_at=3, RANK="1", WORLD_SIZE="3")]) == [-signal.SIGKILL]
    assert list(folder.glob(".shard-*.unfinished-*"))
    assert exit_codes([start(pictures, folder, vae, RANK="0", WORLD_SIZE="3")]) == [0]
    assert contents(folder) == contents(prepared)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "got 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "got -1 of 2"),
        ({"RANK": "first"}, "RANK must be a number, got 'first'"),
    ],
    ids=["high", "low", "word"],
)
def test_impossible_ranks(environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        Rank.from_environment()


def test_each_local_rank_has_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert Rank(5, 8, 1).device("cuda") == torch.device("cuda:1")
    assert Rank(5, 8, 1).device("cuda:3") == torch.device("cuda:3")
    assert Rank(5, 8, 1).device("cpu") == torch.device("cpu")
    assert Rank(0, 8, 6).device(None) == torch.device("cuda:6")
    with pytest.raises(ValueError, match="there is no device cuda:8, this machine has 8 GPUs"):
        Rank(8, 16, 8).device(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Rank(0, 8, 6).device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="this machine has 0 GPUs"):
        Rank(0, 8, 6).device("cuda")


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"mirror": False}, {"batch_size": 4}, {"crop": "adm"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_options_are_not_mixed(prepared: Path, pictures: Path, vae: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        prepare(pictures, prepared, vae=vae, **OPTIONS | changes)


def test_another_source_is_not_mixed(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    """A finished folder is not taken for the latents of other pictures, of more of them, or of a source not there."""
    before = contents(prepared)
    source = shutil.copytree(pictures, tmp_path / "more")
    shutil.copy(next(source.rglob("*.png")), source / "class0" / "again.png")
    with pytest.raises(ValueError, match="begun from another source"):
        prepare(source, prepared, vae=vae, **OPTIONS)
    with pytest.raises(FileNotFoundError, match="gone"):
        prepare(tmp_path / "gone", prepared, vae=vae, **OPTIONS)
    assert contents(prepared) == before


def test_other_weights_are_not_mixed(prepared: Path, pictures: Path, tmp_path: Path) -> None:
    """Not even under the same name."""
    tiny_network(seed=1).save_pretrained(tmp_path / "tiny-vae")
    with pytest.raises(ValueError, match="vae_sha256"):
        prepare(pictures, prepared, vae=tmp_path / "tiny-vae", **OPTIONS)


def test_unreadable_pictures(pictures: Path, vae: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(pictures, source)
    (source / "class0" / "03.png").write_bytes(b"no picture")
    manifest = prepare(source, tmp_path / "out", vae=vae, **OPTIONS)
    assert manifest.samples == COUNT - 1
    assert "class0/03.png" in (tmp_path / "out" / "skipped.txt").read_text()
    with pytest.raises(ValueError, match=r"class0/03\.png"):
        prepare(source, tmp_path / "strict", vae=vae, strict=True, **OPTIONS)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_goes_away(
    pictures: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """It is no picture to skip: the call ends with one line and no shard that lacks it."""
    source = tmp_path / "source"
    shutil.copytree(pictures, source)

    def listed_and_gone(path: Path, **options: Any) -> RawSource:
        found = open_source(path, **options)
        (source / "class0" / "03.png").unlink()
        return found

    monkeypatch.setattr("shortcutflow.data.prepare.open_source", listed_and_gone)
    with pytest.raises(FileNotFoundError, match=r"class0/03\.png") as caught:
        prepare(source, tmp_path / "out", vae=vae, **OPTIONS | {"workers": workers})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_moments_outside_float16_are_never_infinite() -> None:
    network = tiny_network()
    pixels = np.stack([picture(0), picture(1)])

    def encoded(bias: float) -> np.ndarray:
        with torch.no_grad():
            network.quant_conv.bias[0] = bias
        return encode_images(Autoencoder(network, "large"), pixels, ["first", "second"], mirror=True)

    assert np.isfinite(encoded(65000.0)).all()
    for bias in (66000.0, float("nan")):
        with pytest.raises(ValueError, match=r"latent of first reaches .* outside the range of\s+float16"):
            encoded(bias)


def test_size_must_fit_the_autoencoder(pictures: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sizes that 2 divides, got 9"):
        prepare(pictures, tmp_path / "out", vae=vae, **OPTIONS | {"size": 9})
    assert not (tmp_path / "out").exists()


def test_pictures_decoded_by_worker_processes(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "out", vae=vae, **OPTIONS | {"workers": 2})
    assert contents(tmp_path / "out") == contents(prepared)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--latents", "--format", "png"], "--format and --quality are for images"),
        (["--vae", "folder"], "go with --latents"),
        (["--no-mirror"], "go with --latents"),
    ],
    ids=["format", "vae", "mirror"],
)
def test_options_that_do_not_go_together(
    options: list[str], says: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(pictures), str(tmp_path / "out"), "--size", "8", *options])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_from_image_shards(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    """Pictures that were prepared as lossless shards give the moments of the raw ones, with their labels."""
    prepare(pictures, tmp_path / "images", size=8, crop="none", workers=1, progress=False)
    prepare(tmp_path / "images", tmp_path / "out", vae=vae, **OPTIONS | {"samples_per_shard": COUNT})

    def by_number(folder: Path) -> dict[int, Sample]:
        reader = reader_of(folder)
        shards = enumerate(reader.manifest.shards)
        samples = [reader.read(shard, i) for shard, entry in shards for i in range(entry.samples)]
        return {int(Path(sample.key).stem.rpartition("-")[2]): sample for sample in samples}

    assert Manifest.read(tmp_path / "out").class_names == ("class0", "class1", "class2")
    found, expected = by_number(tmp_path / "out"), by_number(prepared)
    assert found.keys() == expected.keys()
    for number, sample in found.items():
        assert sample.y == number % 3
        # Other neighbours in the batch may change the last bits.
        assert np.allclose(sample.data.astype(np.float32), expected[number].data, rtol=2**-9, atol=1e-5)


def test_without_labels(pictures: Path, vae: Path, tmp_path: Path) -> None:
    manifest = prepare(pictures, tmp_path / "out", vae=vae, labels=False, **OPTIONS)
    assert manifest.num_classes is None
    assert reader_of(tmp_path / "out").read(0, 0).y is None


def test_the_command(
    prepared: Path, pictures: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", str(pictures), str(out), "--size", "8", "--crop", "none", "--latents", "--vae", str(vae),
              "--device", "cpu", "--workers", "0"])  # fmt: skip
    assert f"{out}: 20 samples, 3 classes, 1 shards" in capsys.readouterr().out
    assert Manifest.read(out).latents == Manifest.read(prepared).latents


@pytest.mark.slow
def test_torchrun(prepared: Path, pictures: Path, vae: Path, tmp_path: Path) -> None:
    """The command under ``torchrun`` with two processes writes what one process writes."""
    shared = [
        "prepare", str(pictures), "--size", "8", "--crop", "none", "--latents", "--vae", str(vae), "--device", "cpu",
        "--workers", "1", "--samples-per-shard", "5",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    entry = [sys.executable, "-c", "from shortcutflow.cli import main; main()", *shared]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *entry, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 samples, 3 classes, 4 shards") == 1, "rank 0 alone says so"
    with pytest.raises(SystemExit, match="0"):
        main([*shared, str(tmp_path / "one")])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
