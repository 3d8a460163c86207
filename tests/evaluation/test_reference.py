"""References: the pictures of every source, their statistics and features, and files that do not fit."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shortcutflow.data.digits import write_digits
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.evaluation import reference as reference_module
from shortcutflow.evaluation.distances.statistics import Statistics, save_statistics
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.features.protocols import EvaluationProtocol, open_protocol
from shortcutflow.evaluation.pictures import DigitPictures, open_pictures
from shortcutflow.evaluation.published import clean_fid_statistics
from shortcutflow.evaluation.reference import load_reference, make_reference


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
    return np.stack(list(DigitPictures().read(range(1797))))


def test_statistics_are_the_mean_and_covariance(tmp_path: Path) -> None:
    protocol = open_protocol("pixels")
    make_reference(open_pictures("digits"), protocol, tmp_path / "d.npz", with_features=True, work=tmp_path / "work")
    found = load_reference(tmp_path / "d.npz", protocol, with_features=True)
    features = digit_pixels().reshape(1797, -1) / 127.5 - 1
    np.testing.assert_allclose(found.real.statistics.mu, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.real.statistics.sigma, np.cov(features, rowvar=False), atol=1e-6)
    assert found.real.features is not None
    np.testing.assert_allclose(found.real.features, features, atol=1e-6)
    assert (found.record.images, found.record.features, found.record.pictures) == (1797, 1797, "digits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "d.npz", "d.safetensors"]
    with np.load(tmp_path / "d.npz") as archive:
        assert sorted(archive) == ["mu", "sigma"], "the authors' layout"


def test_shards_are_the_same_pictures(tmp_path: Path) -> None:
    write_digits(tmp_path / "shards")
    shards = open_pictures(tmp_path / "shards")
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
    raw = open_pictures(tmp_path / "raw")
    found = list(raw.read(range(6)))
    assert all(np.array_equal(a, b) for a, b in zip(found, made.values(), strict=True))
    make_reference(raw, means(), tmp_path / "r.npz", with_features=True, work=tmp_path / "work")
    features = load_reference(tmp_path / "r.npz", means(), with_features=True).real.features
    assert features is not None
    np.testing.assert_allclose(features, [pixels.mean((0, 1)) for pixels in made.values()], rtol=1e-6)

    cropped = open_pictures(tmp_path / "raw", size=4)
    assert {picture.shape for picture in cropped.read(range(6))} == {(4, 4, 3)}
    assert cropped.fingerprint() != raw.fingerprint()
    with pytest.raises(ValueError, match=r"holds a picture of 12x8 pixels, the samples have 4x4: .* --size 4"):
        make_reference(raw, means(), tmp_path / "r.npz", with_features=False, work=tmp_path / "work", side=(4, 4))
    (tmp_path / "raw/a/1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"picture a/1.png of .* not a picture"):
        list(open_pictures(tmp_path / "raw").read(range(6)))


def test_pictures_of_other_sizes_need_an_extractor_that_takes_them(tmp_path: Path) -> None:
    for i in range(2):
        Image.fromarray(np.zeros((4 + i, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="pictures of different sizes"):
        make_reference(
            open_pictures(tmp_path), open_protocol("pixels"), tmp_path / "r.npz", with_features=False,
            work=tmp_path / "work",
        )  # fmt: skip


def test_shards_of_other_things_are_refused(tmp_path: Path) -> None:
    rows = (Sample(np.zeros((4, 2), np.float32), None, f"row{i}") for i in range(3))
    write_shards(rows, tmp_path / "rows", samples_per_shard=3, preprocessing="zeros")
    with pytest.raises(ValueError, match="holds numbers that are no images: a reference is made of pictures"):
        open_pictures(tmp_path / "rows")


def test_a_stopped_call_goes_on(tmp_path: Path) -> None:
    pictures, work = open_pictures("digits"), tmp_path / "work"
    with pytest.raises(OSError, match="taken away"):
        make_reference(pictures, means(Means(fail_after=1200)), tmp_path / "r.npz", with_features=False, work=work)
    assert not (tmp_path / "r.npz").exists()
    again = Means()
    make_reference(pictures, means(again), tmp_path / "r.npz", with_features=False, work=work)
    assert again.seen == 797 + 1, "the first part is there, and the extractor is probed"
    make_reference(pictures, means(), tmp_path / "whole.npz", with_features=False, work=work)
    assert (tmp_path / "r.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_at_most_so_many_features_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced, so that sorted pictures are all represented; the statistics are of all."""
    monkeypatch.setattr(reference_module, "MOST_ROWS", 100)
    make_reference(open_pictures("digits"), means(), tmp_path / "r.npz", with_features=True, work=tmp_path / "work")
    found = load_reference(tmp_path / "r.npz", means(), with_features=True)
    every = digit_pixels().mean((1, 2))
    assert found.real.features is not None
    np.testing.assert_allclose(found.real.features, every[np.arange(100) * 1797 // 100], rtol=1e-6)
    np.testing.assert_allclose(found.real.statistics.mu, every.mean(0), rtol=1e-6)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    make_reference(open_pictures("digits"), means(), path, with_features=True, work=tmp_path / "work")
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
    assert found.record.protocol is None, "anybody's statistics serve; the report says that nobody knows their protocol"


def test_an_extractor_that_has_changed_under_its_name_is_noticed(tmp_path: Path) -> None:
    class Changed(Means):
        """The same name, other numbers."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def __call__(self, images: np.ndarray) -> Extracted:
            return Extracted(super().__call__(images).features * np.float32(self.factor), None)

    path = tmp_path / "r.npz"
    make_reference(open_pictures("digits"), means(), path, with_features=False, work=tmp_path / "work")
    load_reference(path, means(Changed(1.001)), with_features=False)  # as another device would
    with pytest.raises(ValueError, match="was made by another 'means' than this one"):
        load_reference(path, means(Changed(1.05)), with_features=False)


def test_statistics_of_clean_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what already lies in clean-fid's folder; nothing is fetched."""
    origin = str(tmp_path / "cleanfid" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=origin))
    stats = tmp_path / "cleanfid" / "stats"
    with pytest.raises(FileNotFoundError, match=r"there is no cifar10_clean_train_SIZE.npz in .*stats"):
        clean_fid_statistics("cifar10-train", "clean-fid")
    stats.mkdir(parents=True)
    for size in (32, 64):
        save_statistics(stats / f"cifar10_clean_train_{size}.npz", Statistics(np.zeros(3), np.eye(3)))
    (stats / "cifar10_clean_train_32_kid.npz").touch()
    assert clean_fid_statistics("cifar10-train-32", "clean-fid") == stats / "cifar10_clean_train_32.npz"
    with pytest.raises(ValueError, match="are there for sizes 32, 64: add one"):
        clean_fid_statistics("cifar10-train", "clean-fid")
    (stats / "cifar10_clean_train_64.npz").unlink()
    assert clean_fid_statistics("cifar10-train", "clean-fid") == stats / "cifar10_clean_train_32.npz"
    for name in ("cifar10", "../x-train", "cifar10-train-32-1", "*-train"):
        with pytest.raises(ValueError, match="are named as"):
            clean_fid_statistics(name, "clean-fid")
    with pytest.raises(ValueError, match="goes with --protocol clean-fid, not adm"):
        clean_fid_statistics("cifar10-train", "adm")


def test_files_replaced_by_others_of_equal_size_are_noticed(tmp_path: Path) -> None:
    for value in (10, 200):
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / f"{value}.bmp")
    opened = open_pictures(tmp_path)
    before = opened.fingerprint()
    assert open_pictures(tmp_path).fingerprint() == before
    first, second = tmp_path / "10.bmp", tmp_path / "200.bmp"
    content = second.read_bytes()
    assert len(content) == first.stat().st_size
    first.write_bytes(content)
    assert open_pictures(tmp_path).fingerprint() != before
    assert opened.fingerprint() == before, "the pictures are looked at once, when the evaluation begins"
