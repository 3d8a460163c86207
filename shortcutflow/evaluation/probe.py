"""One fixed picture, which shows whether an extractor still is the one that made features which were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shortcutflow.evaluation.features.extractors import Extractor

SHOWN = 16
"""Features that are compared."""
TOLERANCE = 1e-2
"""Of their size: devices differ by less, other weights by more."""


@dataclass(frozen=True)
class Probe:
    """What an extractor saw.

    Attributes:
        height, width: of the picture, in pixels.
        features: the first of them.
    """

    height: int
    width: int
    features: Sequence[float]

    @classmethod
    def of(cls, extractor: Extractor, side: Sequence[int]) -> Probe:
        """Of a picture of uniform noise with these sides, (height, width)."""
        height, width = side
        picture = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        return cls(height, width, [float(value) for value in extractor(picture).features[0, :SHOWN]])

    def agrees_with(self, extractor: Extractor) -> bool:
        """Whether it sees the same now, but for rounding."""
        expected = np.array(self.features)
        found = np.array(Probe.of(extractor, (self.height, self.width)).features)
        if found.shape != expected.shape:
            return False
        return bool(np.abs(found - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-6))

    def rounded(self) -> list[float]:
        """Two digits of each feature, for a key; where another device rounds otherwise, work is done again."""
        return [float(f"{value:.2g}") for value in self.features]
