"""Extractors against clean-fid's own code on files, and what they refuse."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanfid import fid
from PIL import Image
from torch import Tensor, nn

from shortcutflow.data.digits import load_digits
from shortcutflow.evaluation.features.digits import DigitExtractor, digit_classifier
from shortcutflow.evaluation.features.extractors import (
    NetworkExtractor,
    PixelExtractor,
    exact_float32,
    extractor_of_file,
)
from shortcutflow.evaluation.features.resize import clean_fid_resize, plain_bilinear, tensorflow_bilinear
from tests.evaluation.inception_standin import save_torchscript
from tests.evaluation.test_resize import pictures

"""First features of the first digit."""


class SmallNetwork(nn.Module):
    """(b, 3, h, w) to (b, 12)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 12, 5, stride=3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x / 255)).mean((2, 3))


def digit_pictures() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits()
    return np.repeat(np.round((images + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1), 3, axis=3), labels


def test_features_are_those_of_clean_fid_on_files(tmp_path: Path) -> None:
    network, images = SmallNetwork().eval(), pictures(9, 40, 33)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    theirs = fid.get_folder_features(
        str(tmp_path), network, num_workers=0, batch_size=4, device=torch.device("cpu"), verbose=False
    )
    ours = NetworkExtractor(network, clean_fid_resize(299), name="small", batch_size=5)(images)
    assert ours.logits is None
    assert ours.features.dtype == np.float32
    np.testing.assert_allclose(ours.features, theirs, atol=1e-6)
    other = NetworkExtractor(lambda x: network(plain_bilinear(x.float(), 299)), name="small")(images)
    assert np.abs(other.features - theirs).max() > 1e-3, "another resize must show"


@pytest.mark.parametrize("resize", ["clean-fid", "bilinear", "tensorflow-1"])
def test_batches_do_not_matter(resize: Any) -> None:
    network, images = SmallNetwork(), pictures(10, 20, 20)

    def extractor_of(batch_size: int) -> NetworkExtractor:
        if resize == "clean-fid":
            return NetworkExtractor(network, clean_fid_resize(31), name="a", batch_size=batch_size)
        resized = plain_bilinear if resize == "bilinear" else tensorflow_bilinear
        return NetworkExtractor(lambda x: network(resized(x.float(), 31)), name="a", batch_size=batch_size)

    whole = extractor_of(100)
    expected = whole(images).features
    assert expected.shape == (10, 12)
    for batch_size in (1, 3, 10):
        np.testing.assert_allclose(extractor_of(batch_size)(images).features, expected, atol=1e-6)
    np.testing.assert_allclose(whole(images[::-1]).features, expected[::-1], atol=1e-6)


def test_features_and_logits() -> None:
    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        x = images / 127.5 - 1
        return x.flatten(1)[:, :4], x.mean((2, 3))

    images = np.stack([np.full((6, 6, 3), value, np.uint8) for value in (0, 51, 255)])
    features, logits = NetworkExtractor(network, name="a")(images)
    np.testing.assert_allclose(features[:, 0], [-1, -0.6, 1], atol=1e-6)
    assert logits is not None
    np.testing.assert_allclose(logits, np.repeat([[-1], [-0.6], [1]], 3, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda x: x, r"must return features \(2, k\), it returned \(2, 3, 8, 8\)"),
        (lambda x: x.flatten(1)[:1], r"must return features \(2, k\), it returned \(1, 192\)"),
        (lambda x: None, "it returned NoneType"),
        (lambda x: x.flatten(1) / 0, "features that are not finite"),
        (lambda x: (x.flatten(1), x.flatten(1) / 0), "logits that are not finite"),
        (lambda x: x.float().flatten(1) @ torch.ones(5, 5), "extractor mine fails on images"),
    ],
    ids=["spatial", "rows", "none", "nan", "nan_logits", "shape"],
)
def test_wrong_networks(network: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NetworkExtractor(network, name="mine")(pictures(2, 8, 8))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 1), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
    ids=["float", "single", "grey", "none"],
)
def test_what_is_no_picture(images: np.ndarray) -> None:
    for extractor in (PixelExtractor(), NetworkExtractor(SmallNetwork(), name="a")):
        with pytest.raises(ValueError, match=r"images must be \(n, h, w, 3\) uint8"):
            extractor(images)


def test_batches_of_no_images() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        NetworkExtractor(SmallNetwork(), name="a", batch_size=0)


def test_torchscript_file(tmp_path: Path) -> None:
    network, images = SmallNetwork(), pictures(3, 24, 24)
    file = save_torchscript(network, tmp_path / "net.pt")
    extractor = extractor_of_file(file)
    expected = NetworkExtractor(network, name="a")(images).features
    np.testing.assert_allclose(extractor(images).features, expected, atol=1e-6)
    assert extractor.name.startswith("file:net.pt sha256:")
    other = extractor_of_file(save_torchscript(SmallNetwork(seed=1), tmp_path / "other.pt"))
    assert other.name.split("sha256:")[1] != extractor.name.split("sha256:")[1]
    assert np.abs(other(images).features - expected).max() > 1e-3


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="a pickle, which is never loaded"):
        extractor_of_file(tmp_path / "pickle.pt")
    # With code beside it, so that it passes as TorchScript.
    with zipfile.ZipFile(tmp_path / "pickle.pt", "a") as archive:
        archive.writestr("pickle/code/__torch__.py", "")
        archive.writestr("pickle/constants.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match="cannot be loaded as TorchScript"):
        extractor_of_file(tmp_path / "pickle.pt")
    assert not (tmp_path / "ran").exists()
    torch.save(Payload(tmp_path / "ran"), tmp_path / "again.pt")
    torch.load(tmp_path / "again.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload would have run"


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_torchscript(SmallNetwork(), tmp_path / "net.pt")
    content = file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no TorchScript file, which is a zip archive"):
        extractor_of_file(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        extractor_of_file(tmp_path / "absent.pt")
    monkeypatch.setattr("shortcutflow.evaluation.features.extractors.LARGEST", 100)
    with pytest.raises(ValueError, match="at most 100 is read"):
        extractor_of_file(file)


def test_an_archive_that_would_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortcutflow.evaluation.features.extractors.LARGEST", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/code/__torch__.py", " " * 2 * 10**6)
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    with pytest.raises(ValueError, match="would unpack to"):
        extractor_of_file(tmp_path / "bomb.pt")


def test_pixels() -> None:
    images = pictures(4, 3, 5)
    features, logits = PixelExtractor()(images)
    assert logits is None
    assert features.shape == (4, 45)
    np.testing.assert_allclose(features[2], images[2].reshape(-1) / 127.5 - 1, atol=1e-6)
    PixelExtractor()(pictures(1, 36, 36))
    with pytest.raises(ValueError, match="images of 37x37 have 4107 values, pixels are compared up to 4096"):
        PixelExtractor()(pictures(1, 37, 37))


def test_digits_are_their_pixels_and_read() -> None:
    extractor, (pixels, labels) = DigitExtractor(), digit_pictures()
    assert digit_classifier()[1] > 0.97
    real = load_digits()[0]
    assert np.array_equal(extractor(pixels).features, real.reshape(1797, 64)), "8 bits hold the 17 grey levels"
    floats = real.transpose(0, 2, 3, 1) * 1.5
    assert np.array_equal(extractor(floats).features, floats.reshape(1797, 64)), "not clipped"
    assert (extractor.read(pixels) == labels).mean() > 0.98
    noise = np.random.default_rng(0).integers(0, 256, (1797, 8, 8, 3), dtype=np.uint8)
    assert (extractor.read(noise) == labels).mean() < 0.2, "the control"
    with pytest.raises(ValueError, match=r"images of 8x8 pixels, got \(9, 8\)"):
        extractor(pictures(2, 9, 8))


def test_exact_float32_beside_the_new_switches() -> None:
    cudnn = torch.backends.cudnn
    places: tuple[Any, ...] = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        torch.backends.fp32_precision = "tf32"
        with exact_float32():
            assert (cudnn.conv.fp32_precision, cudnn.deterministic) == ("ieee", True)
        assert (cudnn.conv.fp32_precision, cudnn.deterministic) == ("tf32", False)
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
