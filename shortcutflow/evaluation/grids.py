"""Grids of samples: a row a sampling budget, a column a noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def sample_grid(rows: Sequence[Tensor], labels: Sequence[str], *, cell: int = 48) -> np.ndarray:
    """Draw rows of images with a label before each row.

    Args:
        rows: each (n, 1 or 3, h, w) in [-1, 1]; values beyond are clipped.
        labels: one text a row.
        cell: pixels of an image's longer side; images are enlarged by a whole factor, never blurred.

    Returns:
        The picture, (height, width, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    n, _, h, w = rows[0].shape
    factor = max(1, cell // max(h, w))
    h, w, gap = h * factor, w * factor, 2
    font = ImageFont.load_default(size=14)
    margin = 12 + max(int(font.getlength(label)) for label in labels)
    picture = Image.new("RGB", (margin + n * (w + gap), len(rows) * (h + gap) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for i, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = gap + i * (h + gap)
        draw.text((6, top + h // 2), label, fill="black", font=font, anchor="lm")
        for j, pixels in enumerate(to_uint8(images)):
            picture.paste(
                Image.fromarray(pixels).resize((w, h), Image.Resampling.NEAREST), (margin + j * (w + gap), top)
            )
    return np.asarray(picture)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 1 or 3, h, w) in [-1, 1] as (n, h, w, 3) uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


def save_picture(pixels: np.ndarray, path: str) -> None:
    """Write (h, w, 3) uint8 as a PNG."""
    from PIL import Image

    Image.fromarray(pixels).save(path)
