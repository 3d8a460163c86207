"""Grids of images with titles; samples of a network in one: a row for each number of steps, a column for each noise."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.evaluation.generate import generate, initial_noise
from shortcutflow.models.model import Model

FONT_SIZE = 14
GAP, GROUP_GAP = 2, 14
"""Pixels between images, and between groups of rows."""


def image_grid(
    rows: Sequence[Tensor],
    row_titles: Sequence[str],
    *,
    column_titles: Sequence[str] = (),
    title: str = "",
    group: int = 0,
    cell: int = 48,
) -> np.ndarray:
    """Draw rows of images, each with a title at its left.

    Args:
        rows: each (n, 1 or 3, h, w) in [-1, 1]; values beyond are clipped.
        row_titles: one for each row.
        column_titles: one for each column, or none.
        title: above all; long ones are broken into lines.
        group: so many rows belong together, with a wider gap below them; 0 for no groups.
        cell: pixels of an image's longer side; images are enlarged by a whole factor, never blurred.

    Returns:
        (height, width, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=FONT_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size(text: str) -> tuple[int, int]:
        _, _, right, bottom = ruler.multiline_textbbox((0, 0), text, font=font) if text else (0, 0, 0, -6)
        return int(right) + 1, int(bottom) + 6

    n, _, h, w = rows[0].shape
    factor = max(1, cell // max(h, w))
    h, w = h * factor, w * factor
    left = 12 + max(size(text)[0] for text in row_titles)
    column = max(w, *(size(text)[0] + 8 for text in ("", *column_titles))) + GAP
    title = textwrap.fill(title, max(60, (left + n * column) // 8))
    row = max(h, *(size(text)[1] - 6 for text in row_titles)) + GAP
    top = GAP + size(title)[1] + max(size(text)[1] for text in ("", *column_titles))
    tops = [top + i * row + (i // group * GROUP_GAP if group else 0) for i in range(len(rows))]
    canvas = Image.new("RGB", (max(left + n * column, 12 + size(title)[0]), tops[-1] + row), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((6, GAP), title, fill="black", font=font)
    for j, text in enumerate(column_titles):
        place = (left + j * column + (column - GAP) // 2, top - GAP)
        draw.multiline_text(place, text, fill="black", font=font, anchor="md", align="center")
    for y, images, text in zip(tops, rows, row_titles, strict=True):
        draw.multiline_text((6, y + (row - GAP) // 2), text, fill="black", font=font, anchor="lm")
        for j, pixels in enumerate(to_uint8(images)):
            image = Image.fromarray(pixels).resize((w, h), Image.Resampling.NEAREST)
            canvas.paste(image, (left + j * column + (column - GAP - w) // 2, y))
    return np.asarray(canvas)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 1 or 3, h, w) in [-1, 1] as (n, h, w, 3) uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


def save_image(pixels: np.ndarray, out: str | Path | IO[bytes]) -> None:
    """Write (h, w, 3) uint8 as a PNG whose metadata name this library."""
    from PIL import Image, PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("Software", "shortcutflow")
    Image.fromarray(pixels).save(out, format="PNG", pnginfo=metadata)


def n_steps(steps: int) -> str:
    """A number of steps as the title of a row."""
    return f"{steps} step{'s' * (steps > 1)}"


def sample_grid(
    model: Model,
    *,
    steps: Sequence[int],
    labels: Sequence[int] | None = None,
    count: int | None = None,
    seed: int = 0,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """Draw samples, (height, width, 3) uint8: a row for each number of steps, the same noise in each column.

    Args:
        model: the network that is sampled.
        steps: numbers of steps.
        labels: one for each column; None takes ``count`` columns, or 10, with all labels in turn.
        seed: of the noise.
        guidance_scale: of classifier-free guidance; 1 is none.

    Raises:
        ValueError: for a network whose samples are not images, fewer than one step, or labels that do not fit.
    """
    noise, y = initial_noise(model, labels=labels, count=count, seed=seed)
    rows = [generate(model, noise, y, steps=number, guidance_scale=guidance_scale, seed=seed) for number in steps]
    return image_grid(ImageDecoder(model.info, model.device)(*rows), [n_steps(number) for number in steps])
