"""Reading pictures of every kind, cropping and encoding them."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from shortcutflow.data.images import Crop, ImageError, encode_image, read_image, to_square


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = read_image(content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some detail."""
    y, x = np.mgrid[:height, :width]
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(x / 9 + p) + np.cos(y / 7 - p) + np.sin((x + y) / 23 + p) for p in phases]
    return Image.fromarray(np.clip(128 + 40 * np.stack(waves, -1), 0, 255).astype(np.uint8))


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_grey() -> None:
    found = pixels(saved(Image.fromarray(RAMP)))
    assert (found == RAMP[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    wide = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert (pixels(saved(Image.fromarray(wide), kind)) == RAMP[..., None]).all()
    between = np.full((4, 4), 257 * 100 + 129, dtype=np.uint16)
    assert (pixels(saved(Image.fromarray(between), kind)) == 101).all(), "rounded to the nearest"


def test_32_bit_grey_of_unknown_range_is_refused() -> None:
    assert (pixels(saved(Image.fromarray(np.full((4, 4), 65535, dtype=np.int32)), "TIFF")) == 255).all()
    with pytest.raises(ImageError, match="70000"):
        read_image(saved(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF"))
    with pytest.raises(ImageError, match="floating-point"):
        read_image(saved(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF"))


def test_one_bit() -> None:
    board = np.indices((16, 16)).sum(0) % 2 == 0
    assert (pixels(saved(Image.fromarray(board))) == board[..., None] * 255).all()


def test_cmyk_of_adobe_is_not_inverted() -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[..., 0] = 255  # full cyan: no red
    content = saved(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=100)
    assert b"Adobe" in content[:300], "Pillow writes the inverted inks of Adobe's files"
    assert np.abs(pixels(content) - [0, 255, 255]).max() <= 3
    inks[..., :3], inks[..., 3] = 0, 200
    assert np.abs(pixels(saved(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=100)) - 55).max() <= 3


def test_palette() -> None:
    image = photo(16, 16).quantize(8)
    assert (pixels(saved(image)) == np.asarray(image.convert("RGB"))).all()
    assert (pixels(saved(image, "GIF")) == np.asarray(image.convert("RGB"))).all()


def test_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 2), 1)
    for kind in ("PNG", "GIF"):
        found = pixels(saved(image, kind, transparency=0))
        assert tuple(found[2, 1]) == (200, 0, 0)
        assert (found[0, 0] == 255).all()
    assert tuple(pixels(saved(image))[0, 0]) == (10, 20, 30), "without transparency the colour stays"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_laid_on_white(mode: str, kind: str) -> None:
    colour = (100, 100, 100) if mode == "RGBA" else (100,)
    image = Image.new(mode, (3, 1), (*colour, 255))
    image.putpixel((1, 0), (*colour, 0))
    image.putpixel((2, 0), (*colour, 128))
    found = pixels(saved(image, kind))
    assert (found[0, 0] == 100).all()
    assert (found[0, 1] == 255).all()
    assert np.abs(found[0, 2] - (100 * 128 + 255 * 127) / 255).max() <= 1


def test_colour_key_of_rgb_is_transparent() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    found = pixels(saved(image, transparency=(1, 2, 3)))
    assert found.tolist() == [[[255] * 3, [9] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_every_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    upright = np.asarray(photo(24, 16)).astype(int)
    # How the camera stored it: the inverse of what the tag asks for.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    found = pixels(saved(Image.fromarray(stored.astype(np.uint8)), kind, exif=exif, **options))
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (6 if kind == "JPEG" else 0)


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    image = photo(24, 16)
    content = saved(image, "PNG", exif=b"Exif\0\0II*\0" + b"\xff" * 20)
    assert (pixels(content) == np.asarray(image)).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert (pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [255, 0, 0]).all()


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header promises this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (20_000, 10_000), (10, 2_000_000_000)])
def test_bombs_are_refused_by_their_header(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="too"):
        read_image(png_of(width, height))


def test_limit_is_of_pixels() -> None:
    content = saved(photo(30, 20))
    assert read_image(content, most_pixels=600).size == (30, 20)
    with pytest.raises(ImageError, match="30x20 pixels are too many: at most 599"):
        read_image(content, most_pixels=599)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_cut_off_files(kind: str) -> None:
    content = saved(photo(64, 64), kind)
    assert read_image(content).size == (64, 64)
    for length in (0, 1, 10, 30, len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(ImageError) as caught:
            read_image(content[:length])
        assert len(str(caught.value)) < 200


def test_any_damage_is_an_image_error_or_a_picture() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        content = np.frombuffer(saved(photo(24, 24), kind), dtype=np.uint8)
        for _ in range(60):
            broken = content.copy()
            broken[rng.integers(0, min(len(broken), 200), 3)] = rng.integers(0, 256, 3)
            with suppress(ImageError):
                assert read_image(broken.tobytes()).mode == "RGB"


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"P6 1 1 255 abc", b"text"]
)
def test_other_formats_are_not_tried(content: bytes) -> None:
    with pytest.raises(ImageError, match="known format"):
        read_image(content)


def test_colour_profiles_change_nothing() -> None:
    image = photo(16, 16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (pixels(saved(image, icc_profile=profile)) == np.asarray(image)).all()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop, written down once more from its description: sizes first, then all resizing, then the cut."""
    sizes = [image.size]
    while min(sizes[-1]) // (2 * size) >= 1:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    for halved in sizes[1:]:
        image = image.resize(halved, Image.Resampling.BOX)
    short = min(image.size)
    width, height = (round(side * (size / short)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (500, 333), (333, 500), (127, 128), (129, 200), (40, 31)])
def test_adm(width: int, height: int) -> None:
    image = photo(width, height)
    found = np.asarray(to_square(image, 32, "adm"))
    assert (found == adm_crop(image, 32)).all()
    if min(width, height) > 64:
        assert (found != np.asarray(to_square(image, 32, "released"))).any()


@pytest.mark.parametrize("crop", ["released", "adm", "stretch"])
def test_constant_colours_stay(crop: Crop) -> None:
    found = np.asarray(to_square(Image.new("RGB", (97, 61), (10, 200, 90)), 32, crop))
    assert found.shape == (32, 32, 3)
    assert (found == [10, 200, 90]).all()


def test_released_crop_takes_the_middle() -> None:
    # Brightness is the column; the middle 100 of 256 columns, averaged in fives.
    columns = np.broadcast_to(np.arange(256, dtype=np.uint8), (100, 256))
    found = np.asarray(to_square(Image.fromarray(np.stack([columns] * 3, -1)), 20, "released"))[..., 0].astype(float)
    exact = 78 + 5 * np.arange(20) + 2
    assert np.abs(found - exact)[:, 2:-2].max() <= 0.5, "the triangle filter keeps a ramp away from the edges"
    assert np.abs(found - exact).max() <= 2


def test_released_crop_is_antialiased() -> None:
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    found = np.asarray(to_square(Image.fromarray(stripes), 16, "released"))
    assert np.abs(found.astype(int) - 127.5).max() <= 8


def test_odd_margins_lie_right_and_below() -> None:
    image = Image.fromarray(np.broadcast_to(np.arange(7, dtype=np.uint8)[None, :, None], (4, 7, 3)).copy())
    assert np.asarray(to_square(image, 4, "released"))[0, :, 0].tolist() == [1, 2, 3, 4]


def test_no_crop_needs_the_size() -> None:
    image = photo(32, 32)
    assert to_square(image, 32, "none") is image
    with pytest.raises(ImageError, match="30x32 pixels, not 32x32"):
        to_square(photo(30, 32), 32, "none")


def test_a_long_line_does_not_grow_beyond_all_bounds() -> None:
    line = Image.new("RGB", (1_000_000, 1))
    with pytest.raises(ImageError, match="too many"):
        to_square(line, 256, "adm")
    assert to_square(line, 256, "released").size == (256, 256)


def test_unknown_crop() -> None:
    with pytest.raises(ValueError, match="unknown crop 'center'; known: released, adm"):
        to_square(photo(8, 8), 8, "center")  # type: ignore[arg-type]


def test_encoding() -> None:
    image = photo(64, 64)
    exact = np.asarray(image).astype(int)
    assert (pixels(encode_image(image, "png")) == exact).all()
    assert (pixels(encode_image(image, "webp", 100)) == exact).all()
    assert (pixels(encode_image(np.moveaxis(np.asarray(image), -1, 0), "png")) == exact).all()
    assert (pixels(encode_image(RAMP[None], "png")) == RAMP[..., None]).all()
    errors = [np.abs(pixels(encode_image(image, "jpg", quality)) - exact).mean() for quality in (20, 75, 95, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1
    assert len(encode_image(image, "webp", 60)) < len(encode_image(image, "webp", 100))


@pytest.mark.parametrize(("quality", "sampling"), [(94, (2, 2)), (95, (1, 1)), (100, (1, 1))])
def test_colour_keeps_its_resolution_at_high_quality(quality: int, sampling: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(encode_image(photo(64, 64), "jpg", quality))) as image:
        assert image.layer[0][1:3] == sampling  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("extension", "quality", "said"), [("jpg", 0, "1 ... 100"), ("jpg", 101, "101"), ("bmp", 9, "png")]
)
def test_encoding_refuses(extension: str, quality: int, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        encode_image(photo(8, 8), extension, quality)  # type: ignore[arg-type]
