"""Handwritten digits: 1,797 real 8x8 images that scikit-learn carries inside its package (no download)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from shortcutflow.data.manifest import MANIFEST
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.io.atomic import build_once


class DigitsData(DataSettings):
    """scikit-learn's digits, written as shards into ``folder`` the first time they are needed."""

    kind: Literal["digits"] = "digits"
    folder: Path = Path("data/digits")

    def prepare(self) -> Path:
        """Write the shards unless they are there; returns their folder."""
        return build_once(self.folder, write_digits, marker=MANIFEST)

    def describe(self) -> DataInfo:
        """One channel of 8x8 pixels, ten classes."""
        return DataInfo(shape=(1, 8, 8), num_classes=10)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 1, 8, 8) float32 in [-1, 1] and labels (1797,) int64, in scikit-learn's order."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'shortcutflow[digits]'") from error
    digits = sklearn_digits()
    return (digits.images[:, None] / 8 - 1).astype(np.float32), digits.target.astype(np.int64)


def write_digits(folder: Path) -> None:
    """Write the digits as four shards of PNG images."""
    images, labels = load_digits()
    pixels = np.round((images + 1) * 127.5).astype(np.uint8)  # 17 grey levels spread over 0 ... 255
    numbered = enumerate(zip(pixels, labels.tolist(), strict=True))
    write_shards(
        (Sample(image, label, f"digit{i:04d}") for i, (image, label) in numbered),
        folder,
        samples_per_shard=500,
        num_classes=10,
        class_names=tuple("0123456789"),
        preprocessing="scikit-learn load_digits, 17 grey levels as round(value * 255 / 16)",
    )
