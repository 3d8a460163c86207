"""References: the pictures of every source, their statistics and features, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shortcutflow.data.digits import write_digits
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.distributed import World
from shortcutflow.evaluation import feature_set
from shortcutflow.evaluation import reference as reference_module
from shortcutflow.evaluation.distances.statistics import Statistics, save_statistics
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.features.protocols import EvaluationProtocol, open_protocol
from shortcutflow.evaluation.real_images import digit_images, open_images
from shortcutflow.evaluation.reference import clean_fid_reference, load_reference, make_reference

ALONE = World(0, 1, torch.device("cpu"))


class Means:
    """Three features of pictures of any size, and a count of the pictures seen."""

    name = "means"

    def __init__(self, fail_after: int | None = None) -> None:
        self.seen, self.fail_after = 0, fail_after

    def __call__(self, images: np.ndarray) -> Extracted:
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise OSError("the machine is taken away")
        self.seen += len(images)
        return Extracted(images.mean((1, 2)).astype(np.float32), None)


def means(extractor: Means | None = None, name: str = "means") -> EvaluationProtocol:
    return EvaluationProtocol(name, "mean colours", extractor or Means())


def digit_pixels() -> np.ndarray:
    return np.stack(list(digit_images().read(range(1797))))


def test_statistics_are_the_mean_and_covariance(tmp_path: Path) -> None:
    protocol = open_protocol("pixels")
    make_reference(open_images("digits"), protocol, tmp_path / "d.npz", with_features=True, world=ALONE)
    found = load_reference(tmp_path / "d.npz", protocol, with_features=True)
    features = digit_pixels().reshape(1797, -1) / 127.5 - 1
    np.testing.assert_allclose(found.statistics.mu, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.statistics.sigma, np.cov(features, rowvar=False), atol=1e-6)
    assert found.features is not None
    np.testing.assert_allclose(found.features, features, atol=1e-6)
    assert (found.record.images, found.record.features, found.record.source) == (1797, 1797, "digits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "d.npz", "d.safetensors"]
    with np.load(tmp_path / "d.npz") as archive:
        assert sorted(archive) == ["mu", "sigma"], "the authors' layout"


def test_shards_are_the_same_pictures(tmp_path: Path) -> None:
    write_digits(tmp_path / "shards")
    shards = open_images(tmp_path / "shards")
    assert shards.count == 1797
    np.testing.assert_array_equal(np.stack(list(shards.read(range(0, 1797)))), digit_pixels())
    np.testing.assert_array_equal(np.stack(list(shards.read(range(490, 1010)))), digit_pixels()[490:1010])


def test_raw_pictures_as_they_are_and_cropped(tmp_path: Path) -> None:
    """Class folders are no matter, sizes may differ, and each is what Pillow reads."""
    rng = np.random.default_rng(0)
    made = {f"{kind}/{i}.png": rng.integers(0, 256, (8 + i, 12, 3), np.uint8) for kind in "ab" for i in range(3)}
    for name, pixels in made.items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "raw" / name)
    raw = open_images(tmp_path / "raw")
    found = list(raw.read(range(6)))
    assert all(np.array_equal(a, b) for a, b in zip(found, made.values(), strict=True))
    make_reference(raw, means(), tmp_path / "r.npz", with_features=True, world=ALONE)
    features = load_reference(tmp_path / "r.npz", means(), with_features=True).features
    assert features is not None
    np.testing.assert_allclose(features, [pixels.mean((0, 1)) for pixels in made.values()], rtol=1e-6)

    cropped = open_images(tmp_path / "raw", size=4)
    assert {picture.shape for picture in cropped.read(range(6))} == {(4, 4, 3)}
    assert cropped.fingerprint() != raw.fingerprint()
    with pytest.raises(ValueError, match=r"holds an image of 12x8 pixels, the samples have 4x4: .* --size 4"):
        make_reference(raw, means(), tmp_path / "r.npz", with_features=False, world=ALONE, side=(4, 4))
    (tmp_path / "raw/a/1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"image a/1.png of .* not an image"):
        list(open_images(tmp_path / "raw").read(range(6)))


def test_pictures_of_other_sizes_need_an_extractor_that_takes_them(tmp_path: Path) -> None:
    for i in range(2):
        Image.fromarray(np.zeros((4 + i, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="images of different sizes"):
        make_reference(
            open_images(tmp_path), open_protocol("pixels"), tmp_path / "r.npz", with_features=False,
            world=ALONE,
        )  # fmt: skip


def test_shards_of_other_things_are_refused(tmp_path: Path) -> None:
    rows = (Sample(np.zeros((4, 2), np.float32), None, f"row{i}") for i in range(3))
    write_shards(rows, tmp_path / "rows", samples_per_shard=3, preprocessing="zeros")
    with pytest.raises(ValueError, match="holds numbers that are no images: a reference is made of images"):
        open_images(tmp_path / "rows")


def test_a_stopped_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "CHECKPOINT_EVERY", 1000)
    pictures = open_images("digits")
    with pytest.raises(OSError, match="taken away"):
        make_reference(pictures, means(Means(fail_after=1200)), tmp_path / "r.npz", with_features=False, world=ALONE)
    assert not (tmp_path / "r.npz").exists()
    again = Means()
    make_reference(pictures, means(again), tmp_path / "r.npz", with_features=False, world=ALONE)
    assert again.seen == 797, "what the checkpoint holds is not extracted again"
    make_reference(pictures, means(), tmp_path / "whole.npz", with_features=False, world=ALONE)
    assert (tmp_path / "r.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_at_most_so_many_features_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced, so that sorted pictures are all represented; the statistics are of all."""
    monkeypatch.setattr(reference_module, "MOST_FEATURES", 100)
    make_reference(open_images("digits"), means(), tmp_path / "r.npz", with_features=True, world=ALONE)
    found = load_reference(tmp_path / "r.npz", means(), with_features=True)
    every = digit_pixels().mean((1, 2))
    assert found.features is not None
    np.testing.assert_allclose(found.features, every[np.arange(100) * 1797 // 100], rtol=1e-6)
    np.testing.assert_allclose(found.statistics.mu, every.mean(0), rtol=1e-6)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    make_reference(open_images("digits"), means(), path, with_features=True, world=ALONE)
    with pytest.raises(ValueError, match="made by protocol 'means', not by 'others'"):
        load_reference(path, means(name="others"), with_features=False)
    other = Means()
    other.name = "means, differently"
    with pytest.raises(ValueError, match="made by extractor 'means', not by 'means, differently'"):
        load_reference(path, means(other), with_features=False)

    features, record = path.with_suffix(".safetensors").read_bytes(), path.with_suffix(".json").read_text()
    path.with_suffix(".safetensors").write_bytes(features[:50])
    with pytest.raises(ValueError, match="is no safetensors file, or damaged"):
        load_reference(path, means(), with_features=True)
    path.with_suffix(".safetensors").write_bytes(features)
    save_statistics(path, Statistics(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="describes other statistics"):
        load_reference(path, means(), with_features=False)
    path.with_suffix(".json").write_text(json.dumps(json.loads(record) | {"more": 1}))
    with pytest.raises(ValueError, match="does not describe a reference"):
        load_reference(path, means(), with_features=False)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="belongs to other statistics"):
        load_reference(path, means(), with_features=True)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds only mean and covariance.*--make-stats SOURCE"):
        load_reference(path, means(), with_features=True)
    found = load_reference(path, means(name="others"), with_features=False)
    assert found.record.protocol is None, "the report says that nobody knows it"


def test_references_of_version_0_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    make_reference(open_images("digits"), means(), path, with_features=False, world=ALONE)
    record = json.loads(path.with_suffix(".json").read_text())
    record |= {"pictures": record.pop("source"), "probe": {"height": 8, "width": 8, "features": [0.1]}}
    path.with_suffix(".json").write_text(json.dumps(record))
    assert load_reference(path, means(), with_features=False).record.source == "digits"


def test_statistics_of_clean_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    """By clean-fid's own function, which is asked for the samples' size where the name has none."""
    features = pytest.importorskip("cleanfid.features", reason="pip install 'shortcutflow[eval]'")
    asked: list[tuple[str, str, str]] = []

    def statistics(name: str, size: str, *, split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append((name, size, split))
        if name == "none":
            raise OSError("no network")
        return np.zeros(3), np.eye(3)

    monkeypatch.setattr(features, "get_reference_statistics", statistics)
    protocol = means(name="clean-fid")
    found = clean_fid_reference("cifar10-train-32", protocol, (64, 64))
    assert (found.file, found.record.source, found.features) == (*["clean-fid:cifar10-train-32"] * 2, None)
    clean_fid_reference("ffhq-trainval70k", protocol, (64, 64))
    assert asked == [("cifar10", "32", "train"), ("ffhq", "64", "trainval70k")]
    with pytest.raises(FileNotFoundError, match="of none, split train, size 64 cannot be read"):
        clean_fid_reference("none-train", protocol, (64, 64))
    for name in ("cifar10", "../x-train", "cifar10-train-32-1", "*-train"):
        with pytest.raises(ValueError, match="are named as"):
            clean_fid_reference(name, protocol, (64, 64))
    with pytest.raises(ValueError, match="goes with --protocol clean-fid, not adm"):
        clean_fid_reference("cifar10-train", means(name="adm"), (64, 64))


def test_files_replaced_by_others_of_equal_size_are_noticed(tmp_path: Path) -> None:
    for value in (10, 200):
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / f"{value}.bmp")
    opened = open_images(tmp_path)
    before = opened.fingerprint()
    assert open_images(tmp_path).fingerprint() == before
    first, second = tmp_path / "10.bmp", tmp_path / "200.bmp"
    content = second.read_bytes()
    assert len(content) == first.stat().st_size
    first.write_bytes(content)
    assert open_images(tmp_path).fingerprint() != before
    assert opened.fingerprint() == before, "the pictures are looked at once, when the evaluation begins"
