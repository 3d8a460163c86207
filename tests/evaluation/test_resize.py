"""Each resize against its own definition, and against each other: they must differ, or the protocols would be one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer

from shortcutflow.evaluation.features.resize import (
    clean_fid_resize,
    plain_bilinear,
    tensorflow_bilinear,
    unresized,
)


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def bilinear_by_hand(image: np.ndarray, size: int, offset: float) -> np.ndarray:
    """(h, w) to (size, size): sample i at (i + offset) * length / size - offset, neighbours weighted by nearness."""
    out = np.zeros((size, size))
    places = [np.clip((np.arange(size) + offset) * n / size - offset, 0, n - 1) for n in image.shape]
    for i, y in enumerate(places[0]):
        for j, x in enumerate(places[1]):
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 29), (32, 20, 29), (64, 64, 29), (29, 29, 29)])
def test_bilinear_resizes_by_their_definitions(height: int, width: int, size: int) -> None:
    image = pictures(1, height, width)
    plain, tensorflow = plain_bilinear(as_tensor(image), size), tensorflow_bilinear(as_tensor(image), size)
    for channel in range(3):
        values = image[0, :, :, channel].astype(np.float64)
        np.testing.assert_allclose(plain[0, channel], bilinear_by_hand(values, size, 0.5), atol=1e-3)
        np.testing.assert_allclose(tensorflow[0, channel], bilinear_by_hand(values, size, 0.0), atol=1e-3)
    if (height, width) != (size, size):
        assert float((plain - tensorflow).abs().max()) > 10, "half a pixel's shift must show"


def test_plain_bilinear_is_torchs_without_antialias() -> None:
    images = as_tensor(pictures(2, 64, 48))
    expected = F.interpolate(images, (29, 29), mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(plain_bilinear(images, 29), expected)
    smooth = F.interpolate(images, (29, 29), mode="bilinear", align_corners=False, antialias=True)
    assert float((plain_bilinear(images, 29) - smooth).abs().max()) > 10


def test_tensorflow_bilinear_is_torch_fidelitys() -> None:
    other = pytest.importorskip(
        "torch_fidelity.interpolate_compat_tensorflow", reason="a second implementation to compare with"
    )
    images = as_tensor(pictures(2, 32, 40))
    expected = other.interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(tensorflow_bilinear(images, 299), expected)


def clean(image: np.ndarray, size: int, *, quantize: bool = False) -> np.ndarray:
    """One image (h, w, 3) resized, (size, size, 3)."""
    return clean_fid_resize(size, quantize=quantize)(image[None])[0].permute(1, 2, 0).numpy()


def test_clean_fid_resize_is_clean_fids() -> None:
    for image in (*pictures(2, 32, 32), *pictures(1, 320, 400)):
        assert np.array_equal(clean(image, 299), build_resizer("clean")(image))


def test_clean_fid_resize_is_an_antialiased_bicubic() -> None:
    image = pictures(1, 64, 64)
    expected = F.interpolate(as_tensor(image), (29, 29), mode="bicubic", align_corners=False, antialias=True)
    resized = clean_fid_resize(29)(image)[0]
    assert torch.allclose(resized, expected[0].clamp(0, 255), atol=0.01)


def test_the_three_differ_and_agree_on_a_flat_picture() -> None:
    image = pictures(1, 64, 64)
    clean = clean_fid_resize(29)
    three = [clean(image), plain_bilinear(as_tensor(image), 29), tensorflow_bilinear(as_tensor(image), 29)]
    for i, a in enumerate(three):
        for b in three[:i]:
            assert float((a - b).abs().mean()) > 5
    flat = np.full_like(image, 77)
    for resized in (clean(flat), plain_bilinear(as_tensor(flat), 29), tensorflow_bilinear(as_tensor(flat), 29)):
        assert torch.allclose(resized, torch.full_like(resized, 77), atol=1e-4)


def test_quantized_or_not() -> None:
    # Away from 0 and 255, where the 8-bit picture is cut off between rows and columns too.
    image = pictures(1, 20, 20)[0] // 2 + 64
    rounded, floats = clean(image, 29, quantize=True), clean(image, 29)
    assert rounded.dtype == floats.dtype == np.float32
    assert np.array_equal(rounded, rounded.round())
    assert not np.array_equal(floats, floats.round())
    assert np.abs(rounded - floats).max() < 1.5


@pytest.mark.parametrize("cores", [1, 3])
def test_threads_keep_the_order(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    images = pictures(5, 16, 12)
    resized = clean_fid_resize(29)(images)
    assert resized.shape == (5, 3, 29, 29)
    for image, result in zip(images, resized, strict=True):
        assert np.array_equal(result.permute(1, 2, 0).numpy(), clean(image, 29))
    assert torch.equal(unresized(images), torch.from_numpy(images).permute(0, 3, 1, 2))
