"""One fixed picture, which shows whether an extractor still is the one that made features which were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shortcutflow.evaluation.features.extractors import Extracted, Extractor

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
        return cls.seen(extractor(probe_picture(side)), side)

    @classmethod
    def seen(cls, extracted: Extracted, side: Sequence[int]) -> Probe:
        """Of what an extractor gave for :func:`probe_picture` with these sides."""
        return cls(side[0], side[1], [float(value) for value in extracted.features[0, :SHOWN]])

    def agrees_with(self, other: Probe) -> bool:
        """Whether the same extractor saw both, whose numbers differ by rounding only."""
        expected, found = np.array(self.features), np.array(other.features)
        if (self.height, self.width, found.shape) != (other.height, other.width, expected.shape):
            return False
        return bool(np.abs(found - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-6))


def probe_picture(side: Sequence[int]) -> np.ndarray:
    """One picture of uniform noise, (1, height, width, 3) uint8, always the same."""
    return np.random.default_rng(0).integers(0, 256, (1, *side, 3), dtype=np.uint8)
