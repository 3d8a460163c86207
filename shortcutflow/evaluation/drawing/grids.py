"""Grids of images with texts around them: a row a sampling budget or a sample, a column a noise or a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import ImageFont

FONT_SIZE = 14
LINE = 18
"""Pixels from one line of text to the next."""
GAP = 2
"""Pixels between images."""
GROUP_GAP = 12
"""Pixels more between groups of rows."""


def sample_grid(
    rows: Sequence[Tensor],
    labels: Sequence[str],
    *,
    cell: int = 48,
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    group: int = 0,
    title: str = "",
) -> np.ndarray:
    """Draw rows of images with a label before each row.

    Args:
        rows: each (n, 1 or 3, h, w) in [-1, 1]; values beyond are clipped.
        labels: one text a row.
        cell: pixels of an image's longer side; images are enlarged by a whole factor, never blurred.
        columns: a text above each column, of as many lines as it has; none for no headings.
        captions: a text of one line below each image, by row; none for no captions.
        group: so many rows belong together, with more space after them; 0 for no groups.
        title: a text above all, broken into lines where it is too long.

    Returns:
        The picture, (height, width, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=FONT_SIZE)
    factor = max(1, cell // max(rows[0].shape[2:]))
    layout = _lay_out(rows, labels, columns, captions, group, title, factor, font)
    picture = Image.new("RGB", layout.size, "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(layout.title):
        draw.text((6, 4 + i * LINE), line, fill="black", font=font)
    for text, centre in zip(columns, layout.centres, strict=False):
        place = (centre, layout.tops[0] - 3)
        draw.multiline_text(place, text, fill="black", font=font, anchor="md", align="center", spacing=3)
    for i, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = layout.tops[i]
        draw.text((6, top + layout.height // 2), label, fill="black", font=font, anchor="lm")
        for j, pixels in enumerate(to_uint8(images)):
            image = Image.fromarray(pixels).resize((layout.width, layout.height), Image.Resampling.NEAREST)
            picture.paste(image, (layout.centres[j] - layout.width // 2, top))
            if captions:
                place = (layout.centres[j], top + layout.height + 2)
                draw.text(place, captions[i][j], fill="black", font=font, anchor="ma")
    return np.asarray(picture)


class _Layout(NamedTuple):
    """Where things are, in pixels.

    Attributes:
        size: width and height of the picture.
        title: its lines.
        width, height: of an image.
        centres: of the columns.
        tops: of the rows of images.
    """

    size: tuple[int, int]
    title: list[str]
    width: int
    height: int
    centres: list[int]
    tops: list[int]


def _lay_out(
    rows: Sequence[Tensor],
    labels: Sequence[str],
    columns: Sequence[str],
    captions: Sequence[Sequence[str]],
    group: int,
    title: str,
    factor: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> _Layout:
    n, _, h, w = rows[0].shape
    h, w = h * factor, w * factor
    margin = 12 + max(int(font.getlength(label)) for label in labels)
    texts = [*(line for text in columns for line in text.split("\n")), *(text for row in captions for text in row)]
    column = max([w, *(int(font.getlength(text)) + 8 for text in texts)]) + GAP
    width = margin + n * column
    if title:
        # A narrow grid is given room: a title of one word a line is not read.
        width = max(width, min(420, 12 + int(font.getlength(title))))
    lines = _broken(title, width - 12, font)
    top = GAP
    if lines:
        top += 6 + LINE * len(lines)
    if columns:
        top += 4 + LINE * max(text.count("\n") + 1 for text in columns)
    tops = []
    for i in range(len(rows)):
        tops.append(top)
        top += h + GAP + (LINE + 4 if captions else 0)
        if group and (i + 1) % group == 0 and i + 1 < len(rows):
            top += GROUP_GAP
    centres = [margin + j * column + (column - GAP - w) // 2 + w // 2 for j in range(n)]
    return _Layout((width, top), lines, w, h, centres, tops)


def _broken(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The lines of a text that is to be so many pixels wide."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 1 or 3, h, w) in [-1, 1] as (n, h, w, 3) uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


def save_picture(pixels: np.ndarray, path: str | Path) -> None:
    """Write (h, w, 3) uint8 as a PNG, which says that this library made it."""
    from PIL import Image, PngImagePlugin

    made_by = PngImagePlugin.PngInfo()
    made_by.add_text("Software", "shortcutflow")
    Image.fromarray(pixels).save(path, pnginfo=made_by)
