"""Any image file to RGB, to a square, and to bytes again.

Files come from anywhere, so every size is looked at before memory is given to it, and whatever a decoder raises comes
out as one exception, :class:`ImageError`. Colour profiles are not applied: numbers are taken as they stand.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Crop = Literal["released", "adm", "stretch", "none"]
ImageFormat = Literal["png", "jpg", "webp"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is read, by content, never by name; Pillow knows many more, which only widen what a file can attack."""

MOST_PIXELS = 178_956_970
"""The largest image that is decoded, in pixels: where Pillow too stops (about 13,377 x 13,377)."""

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held: 1 ... 8."""


class ImageError(ValueError):
    """An image that cannot be used: damaged, too large, of another kind or of the wrong size."""


def read_image(content: bytes, *, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Decode a file's bytes to an RGB image, turned upright as its EXIF data says.

    Grey of 16 bits is scaled to 8, transparent parts are laid on white, of an animation the first frame is taken.

    Raises:
        ImageError: if it is no image of a known format, damaged, cut off, or larger than ``most_pixels``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of large images, odd EXIF data and the like; each file is either usable here or not.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image.size, most_pixels)  # it stands in the header, before any pixel is decompressed
            image.load()
            _check_size(image.size, most_pixels)  # a GIF's frame may be larger than its header said
            return _upright(_rgb(image), image)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: more than {MOST_PIXELS} pixels are promised") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, KeyError, ...
        raise ImageError(f"damaged: {textwrap.shorten(str(error) or type(error).__name__, 120)}") from error


def _check_size(size: tuple[int, int], most_pixels: int) -> None:
    width, height = size
    if width * height > most_pixels:
        raise ImageError(f"{width}x{height} pixels are too many: at most {most_pixels} are decoded")
    if width * height == 0:
        raise ImageError(f"{width}x{height} pixels: it is empty")


def _rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB."""
    from PIL import Image

    if image.mode.startswith("I"):  # "I;16" and its byte orders, or "I"
        return _grey_of_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ImageError("its values are floating-point numbers, whose range is not known: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    # Pillow has already turned the inverted inks of Adobe's CMYK files (ImageNet has some) the right way round.
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """0 ... 65535 to 0 ... 255, rounded; Pillow's own conversion would cut everything above 255 off."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"its grey values run from {values.min()} to {values.max()}; at most 16 bits are understood")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Pixels turned as the EXIF data of their image says, or not at all where that is damaged."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        turn = None
    # A copy in any case: the file behind a lazily opened image is closed when reading ends.
    return pixels.copy() if turn is None else pixels.transpose(turn)


def to_square(image: Image.Image, size: int, crop: Crop) -> Image.Image:
    """An RGB image as a square of ``size`` pixels.

    * "released": the middle square of the short side, then antialiased bilinear resizing, as the shortcut paper's
      released code does. An odd pixel of margin lies right and below.
    * "adm": as ADM and its followers (EDM, DiT, SiT): halved by boxes while the short side is at least 2 * size, then
      bicubic to a short side of ``size`` (the long side rounded half to even), then the middle square, the odd pixel
      right and below.
    * "stretch": no crop; antialiased bicubic resizing of both sides.
    * "none": nothing is done.

    Raises:
        ImageError: under "none" for another size; under "adm" if a very long image would become too large.
    """
    from PIL.Image import Resampling

    if crop == "released":
        return _middle(image, min(image.size)).resize((size, size), Resampling.BILINEAR)
    if crop == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.size[0] // 2, image.size[1] // 2), Resampling.BOX)
        scale = size / min(image.size)
        width, height = round(image.size[0] * scale), round(image.size[1] * scale)
        _check_size((width, height), MOST_PIXELS)  # a line of 1 x 1,000,000 pixels grows to 256 x 256,000,000
        return _middle(image.resize((width, height), Resampling.BICUBIC), size)
    if crop == "stretch":
        return image.resize((size, size), Resampling.BICUBIC)
    if crop != "none":
        raise ValueError(f"unknown crop {crop!r}; known: {', '.join(get_args(Crop))}")
    if image.size != (size, size):
        raise ImageError(
            f"it has {image.size[0]}x{image.size[1]} pixels, not {size}x{size}: choose a crop ('released', 'adm' or "
            "'stretch') to resize it"
        )
    return image


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


def encode_image(image: Image.Image | np.ndarray, extension: ImageFormat, quality: int = 95) -> bytes:
    """The bytes of an image file.

    Args:
        image: an image, or pixels (channels, height, width) uint8 of 1 or 3 channels.
        extension: "png" is lossless; "jpg" keeps colour at full resolution from quality 95 on; "webp" is lossless at
            quality 100.
        quality: 1 ... 100, of "jpg" and "webp".
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, -1)))
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must lie in 1 ... 100, got {quality}")
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG"},
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": 0 if quality >= 95 else 2},
        "webp": {"format": "WEBP", "quality": quality, "lossless": quality == 100},
    }
    if extension not in options:
        raise ValueError(f"unknown image format {extension!r}; known: {', '.join(options)}")
    out = io.BytesIO()
    image.save(out, **options[extension])
    return out.getvalue()
