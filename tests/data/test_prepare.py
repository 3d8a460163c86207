"""``shortcutflow prepare``: what it writes and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shortcutflow.cli import main
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.images import encode_image, read_image, to_square
from shortcutflow.data.index import read_index
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.prepare import prepare, shuffled_order
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.readers import Block, FolderReader, RawItem, RawSource
from tests.data.pictures import CLASSES, files_of, picture, pictures, write_files, zip_of

SHARED = Path(os.environ.get("SHORTCUTFLOW_DATA", Path(__file__).parents[3] / "shared" / "data"))


def read_all(folder: Path) -> list[tuple[str, np.ndarray, int | None]]:
    """Name in the source, pixels and label of every sample, in the order of the shards."""
    shards = ShardFolder(folder)
    reader, found = shards, []
    for number, entry in enumerate(shards.manifest.shards):
        names = read_index(shards.index_of(entry), entry).names
        for i, name in enumerate(names):
            sample = reader.read(number, i)
            assert sample.y is None or isinstance(sample.y, int)
            found.append((name, np.asarray(sample.data), sample.y))
    return found


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("raw"), pictures(20))


def test_samples_are_the_pictures(raw: Path, tmp_path: Path) -> None:
    manifest = prepare(raw, tmp_path, size=16, samples_per_shard=6, workers=0, progress=False)
    assert (manifest.shape, manifest.num_classes, manifest.class_names) == ((3, 16, 16), 3, CLASSES)
    assert [shard.samples for shard in manifest.shards] == [6, 6, 6, 2]
    assert Manifest.read(tmp_path) == manifest
    samples = read_all(tmp_path)
    assert sorted(name for name, _, _ in samples) == sorted(pictures(20))
    assert [name for name, _, _ in samples] != sorted(pictures(20)), "shuffled"
    for name, found, label in samples:
        square = to_square(read_image((raw / name).read_bytes()), 16, "released")
        assert (np.moveaxis(found, 0, -1) == np.asarray(square)).all()
        assert label == CLASSES.index(name.partition("/")[0])


def test_number_of_workers_changes_nothing(raw: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        prepare(raw, tmp_path / str(workers), size=16, samples_per_shard=6, workers=workers, progress=False)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_options_change_what_they_say(raw: Path, tmp_path: Path) -> None:
    def made(name: str, **options: object) -> dict[str, tuple[np.ndarray, int | None]]:
        settings = {"size": 16, "workers": 0, "progress": False} | options
        prepare(raw, tmp_path / name, **settings)
        return {key: (pixels, label) for key, pixels, label in read_all(tmp_path / name)}

    plain, other = made("plain"), made("seed", seed=1)
    assert list(plain) != list(other)
    assert set(plain) == set(other)
    assert {label for _, label in made("unlabelled", labels=False).values()} == {None}
    assert Manifest.read(tmp_path / "unlabelled").num_classes is None
    for name in ("adm", "stretch"):
        assert any((made(name, crop=name)[key][0] != plain[key][0]).any() for key in list(plain)[:1])
    errors = []
    for quality in (30, 95):
        lossy = made(f"jpg{quality}", format="jpg", quality=quality)
        errors.append(np.mean([np.abs(lossy[key][0].astype(int) - plain[key][0]).mean() for key in plain]))
    assert errors[0] > 2 * errors[1] > 0
    exact = made("webp", format="webp", quality=100)
    assert all((exact[key][0] == plain[key][0]).all() for key in plain)


@pytest.mark.parametrize(("size", "format"), [(64, "png"), (65, "jpg")])
def test_default_format(raw: Path, tmp_path: Path, size: int, format: str) -> None:
    assert prepare(raw, tmp_path, size=size, workers=0, progress=False).format == format


BAD = {"ant/bad.jpg": picture(1)[:300], "bee/no.png": b"no picture", "bee/notes.txt": b"notes"}


@pytest.fixture(scope="module")
def raw_with_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("bad"), pictures(9) | BAD)


def test_skipped_items_are_listed(raw_with_bad: Path, tmp_path: Path) -> None:
    manifest = prepare(raw_with_bad, tmp_path, size=8, samples_per_shard=3, workers=0, progress=False)
    assert manifest.samples == 9
    assert manifest.settings["skipped"] == 3
    lines = dict(line.split("\t") for line in (tmp_path / "skipped.txt").read_text().splitlines())
    assert set(lines) == set(BAD)
    assert "damaged" in lines["ant/bad.jpg"]
    assert "known format" in lines["bee/no.png"]
    assert "suffix .txt" in lines["bee/notes.txt"]
    # Kept shards remember what they skipped.
    (tmp_path / "manifest.json").unlink()
    before = files_of(tmp_path)
    assert prepare(raw_with_bad, tmp_path, size=8, samples_per_shard=3, workers=0, progress=False) == manifest
    assert files_of(tmp_path).items() > before.items()


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_stops_at_the_first(tmp_path: Path, workers: int) -> None:
    source = write_files(tmp_path / "raw", pictures(9) | {"ant/bad.jpg": picture(1)[:300]})
    options = {"size": 8, "samples_per_shard": 3, "workers": workers, "progress": False}
    with pytest.raises(ValueError, match=r"ant/bad\.jpg: damaged"):
        prepare(source, tmp_path / "out", strict=True, **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # The same holds for shards that a call without strict has left.
    prepare(source, tmp_path / "out", **options)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"ant/bad\.jpg: damaged"):
        prepare(source, tmp_path / "out", strict=True, **options)


def test_strict_takes_other_files_seriously(raw_with_bad: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bee/notes\.txt: not an image"):
        prepare(raw_with_bad, tmp_path, size=8, workers=0, strict=True, progress=False)


def test_nothing_usable(tmp_path: Path) -> None:
    source = write_files(tmp_path / "raw", {"a.jpg": b"no", "b.jpg": b"no"})
    with pytest.raises(ValueError, match="none of the 2 items"):
        prepare(source, tmp_path / "out", size=8, workers=0, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_other_options_or_another_source_are_refused(raw: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path / "out", size=8, workers=0, progress=False)
    before = files_of(tmp_path / "out")
    for unfinished in (False, True):
        if unfinished:
            (tmp_path / "out" / "manifest.json").unlink()
            with pytest.raises(ValueError, match="another source"):
                prepare(write_files(tmp_path / "b", pictures(5)), tmp_path / "out", size=8, workers=0, progress=False)
        with pytest.raises(ValueError, match=r"crop 'released' \(now 'adm'\), seed 0 \(now 3\)"):
            prepare(raw, tmp_path / "out", size=8, crop="adm", seed=3, workers=0, progress=False)
    prepare(raw, tmp_path / "out", size=8, workers=0, progress=False)
    assert files_of(tmp_path / "out") == before


def test_other_versions_do_not_continue_but_a_complete_folder_stays(raw: Path, tmp_path: Path) -> None:
    manifest = prepare(raw, tmp_path, size=8, workers=0, progress=False)
    record = json.loads((tmp_path / "preparation.json").read_text())
    record["versions"]["pillow"] = "1.0"
    (tmp_path / "preparation.json").write_text(json.dumps(record))
    assert prepare(raw, tmp_path, size=8, workers=0, progress=False) == manifest
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"pillow '1\.0'"):
        prepare(raw, tmp_path, size=8, workers=0, progress=False)


def test_a_complete_folder_is_that_of_its_source(raw: Path, tmp_path: Path) -> None:
    """Another source, more files, a source that is not there and ``strict`` are refused, and nothing is changed."""
    source, folder = tmp_path / "cats" / "train", tmp_path / "out"
    shutil.copytree(raw, source)
    options = {"size": 8, "workers": 0, "progress": False}
    manifest = prepare(source, folder, **options)
    assert prepare(source, folder, **options) == manifest
    with pytest.raises(FileNotFoundError, match="gone"):
        prepare(tmp_path / "gone", folder, **options)
    other = tmp_path / "dogs" / "train"
    shutil.copytree(source, other)
    first = next(path for path in sorted(other.rglob("*")) if path.is_file())
    shutil.copy(first, first.with_name("z-new" + first.suffix))
    with pytest.raises(ValueError, match=r"begun from another source \(.*cats/train\)"):
        prepare(other, folder, **options)
    write_files(source, {first.parent.name + "/broken.png": b"not a picture"})
    with pytest.raises(ValueError, match="were added, removed or changed since"):
        prepare(source, folder, **options)
    prepare(source, tmp_path / "new", **options)
    with pytest.raises(ValueError, match=r"was made without 1 items, which .*skipped\.txt lists"):
        prepare(source, tmp_path / "new", strict=True, **options)
    assert Manifest.read(folder) == manifest


def test_folders_of_one_last_name_are_not_mixed_up(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's data whose shards' folder, by its default name, holds another source's: there or not."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        shutil.copytree(raw, tmp_path / name / "train")
    write_files(tmp_path, {"dogs/train/a/new.png": encode_image(Image.new("RGB", (8, 8)), "png", 95)})
    cats, dogs = (ImageFolderData(path=Path(name) / "train", size=8) for name in ("cats", "dogs"))
    assert cats.prepare() == dogs.shards
    with pytest.raises(ValueError, match="another source"):
        dogs.prepare()
    for name in ("cats", "dogs"):
        shutil.rmtree(tmp_path / name)
    assert cats.prepare() == cats.shards, "finished shards are enough"
    with pytest.raises(ValueError, match=r"holds the images of .*cats/train, data.path is dogs/train"):
        dogs.prepare()


def test_folders_with_other_contents_are_left_alone(raw: Path, tmp_path: Path) -> None:
    write_files(tmp_path, {"thesis.tex": b"dear"})
    with pytest.raises(ValueError, match=r"other files \(thesis\.tex\)"):
        prepare(raw, tmp_path, size=8, workers=0, progress=False)
    with pytest.raises(ValueError, match="lies in the raw data"):
        prepare(raw, raw / "shards", size=8, workers=0, progress=False)
    assert not (raw / "shards").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 0}, r"size: .*, got 0"),
        ({"size": 8, "crop": "center"}, "crop: .*'released'.*, got 'center'"),
        ({"size": 8, "format": "gif"}, "format: .*'png'.*, got 'gif'"),
        ({"size": 8, "quality": 101}, "quality: .*, got 101"),
        ({"size": 8, "samples_per_shard": 0}, "samples_per_shard: .*, got 0"),
        ({"size": 8, "workers": -1}, "workers"),
    ],
    ids=["size", "crop", "format", "quality", "samples", "workers"],
)  # fmt: skip
def test_impossible_options(raw: Path, tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        prepare(raw, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "no index", "bad index"])
def test_what_was_lost_is_made_again(raw: Path, tmp_path: Path, damage: str) -> None:
    prepare(raw, tmp_path, size=16, samples_per_shard=6, workers=0, progress=False)
    before, shard, index = files_of(tmp_path), tmp_path / "shard-000001.tar", tmp_path / "shard-000001.index"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "gone":
        shard.unlink()
    elif damage == "no index":
        index.unlink()
    else:
        index.write_bytes(b"\0" * 50)
        (tmp_path / "manifest.json").unlink()
    kept = (tmp_path / "shard-000002.tar").stat().st_mtime_ns
    prepare(raw, tmp_path, size=16, samples_per_shard=6, workers=0, progress=False)
    assert files_of(tmp_path) == before
    assert (tmp_path / "shard-000002.tar").stat().st_mtime_ns == kept, "whole shards are not made again"


def test_full_disk(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = encode_image, iter(range(100))

    def full(*arguments: object) -> bytes:
        if next(calls) == 9:  # in the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    options = {"size": 16, "samples_per_shard": 6, "workers": 0, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr("shortcutflow.data.prepare.encode_image", full)
        with pytest.raises(OSError, match=r"no space left for .*: free some, the same call continues"):
            prepare(raw, tmp_path / "out", **options)
    assert {name for name in files_of(tmp_path / "out") if name.endswith(".tar")} == {"shard-000000.tar"}
    prepare(raw, tmp_path / "out", **options)
    prepare(raw, tmp_path / "whole", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_row_groups_stay_together() -> None:
    items = [RawItem(str(i), None, ()) for i in range(100)]
    blocks = tuple(Block(i, i + 10, 100 * 2**20) for i in range(0, 100, 10))
    source = RawSource("", FolderReader(Path()), items, blocks=blocks)
    order = shuffled_order(source, 0)

    def cut(order: list[int]) -> list[list[int]]:
        return [order[i : i + 20] for i in range(0, 100, 20)]

    assert sorted(order) == list(range(100))
    # Two blocks fit into what a reader keeps, so every twenty items come from two.
    assert all(len({i // 10 for i in part}) == 2 for part in cut(order))
    assert order != shuffled_order(source, 1)
    assert order == shuffled_order(source, 0)
    free = shuffled_order(RawSource("", FolderReader(Path()), items), 0)
    assert sorted(free) == list(range(100))
    assert max(len({i // 10 for i in part}) for part in cut(free)) > 5


def test_command(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["prepare", str(raw), str(tmp_path / "out"), "--workers", "0", *argv])
        assert isinstance(stop.value.code, int)
        return (stop.value.code, *capsys.readouterr())

    code, out, _ = run("--size", "8")
    assert code == 0
    assert "20 samples, 3 classes, 1 shards" in out
    assert "data.kind=shards" in out
    for argv, said in [(["--size", "16"], "size 8 (now 16)"), (["--size", "8", "--crop", "x"], "got 'x'")]:
        code, out, errors = run(*argv)
        assert (code, len(errors.strip().splitlines())) == (2, 1)
        assert said in errors


def test_data_source(raw: Path, tmp_path: Path) -> None:
    data = ImageFolderData(path=raw, size=16, folder=tmp_path / "shards", cache_bytes=0, workers=0)
    assert tuple(data.describe())[:2] == ((3, 16, 16), 3)
    assert not (tmp_path / "shards").exists(), "describing prepares nothing"
    assert data.prepare() == tmp_path / "shards"
    assert tuple(data.describe())[:2] == ((3, 16, 16), 3)
    batch = next(data.open_stream(batch_size=4, seed=0))
    assert batch.data.shape == (4, 3, 16, 16)
    assert ImageFolderData(path=Path("x/cifar.tar"), size=32).shards == Path("data/cifar-32")
    assert ImageFolderData(path=raw, size=16, folder=tmp_path / "shards", labels=False).describe().num_classes == 3
    with pytest.raises(ValueError, match="labels True"):
        ImageFolderData(path=raw, size=16, folder=tmp_path / "shards", labels=False).prepare()


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"there is no {path}; SHORTCUTFLOW_DATA names its folder")
    return path


@pytest.mark.parametrize("crop", ["released", "adm"])
def test_photos_of_imagenet(tmp_path: Path, crop: str) -> None:
    path = shared("imagenet_sample_imagefolder.zip")
    manifest = prepare(path, tmp_path, size=256, crop=crop, samples_per_shard=100, workers=2, progress=False)
    assert (manifest.samples, manifest.num_classes, manifest.format) == (200, 200, "jpg")
    with zipfile.ZipFile(path) as archive:
        classes = sorted({name.partition("/")[0] for name in archive.namelist()})
        assert manifest.class_names == tuple(classes)
        for name, found, label in islice(read_all(tmp_path), 0, None, 10):
            assert label is not None
            assert classes[label] == name.partition("/")[0]
            with Image.open(io.BytesIO(archive.read(name))) as image:
                square = np.asarray(to_square(image.convert("RGB"), 256, crop)).astype(int)
            error = np.abs(np.moveaxis(found, 0, -1) - square)
            assert error.mean() < 2.5, name


@pytest.mark.slow
def test_all_of_cifar(tmp_path: Path) -> None:
    path = shared("cifar10_train_imagefolder.zip")
    manifest = prepare(path, tmp_path, size=32, crop="none", progress=False)
    assert (manifest.samples, manifest.num_classes, manifest.settings["skipped"]) == (50_000, 10, 0)
    samples = read_all(tmp_path)
    assert np.bincount([label for _, _, label in samples if label is not None]).tolist() == [5000] * 10
    assert len({name for name, _, _ in samples}) == 50_000
    source = open_source(path)
    items = {item.name: item for item in source.items}
    for name, found, label in samples:
        assert label is not None
        assert label == items[name].label
        assert manifest.class_names[label] == name.partition("/")[0]
        with Image.open(io.BytesIO(source.read(items[name]))) as image:
            assert (np.asarray(image.convert("RGB")) == np.moveaxis(found, 0, -1)).all()


def test_zip_and_folder_give_the_same_shards(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of(pictures(20)))
    for name, source in (("a", raw), ("b", tmp_path / "x.zip")):
        prepare(source, tmp_path / name, size=16, samples_per_shard=6, workers=0, progress=False)
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert {k: v for k, v in a.items() if "shard" in k} == {k: v for k, v in b.items() if "shard" in k}
