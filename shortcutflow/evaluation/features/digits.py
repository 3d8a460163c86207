"""The 8x8 digits: their pixels as features, and a classifier that reads their labels."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from shortcutflow.data.digits import load_digits
from shortcutflow.evaluation.features.extractors import Extracted

LEAST_ACCURACY = 0.97


@cache
def digit_classifier() -> tuple[Any, float]:
    """A support vector classifier of real digits (n, 64) in [-1, 1], trained on every image but each fifth.

    It comes with its accuracy on the held-out fifth, and a RuntimeError if that is below 97 %.
    """
    images, labels = load_digits()
    from sklearn.svm import SVC

    flat = images.reshape(len(images), 64)
    held_out = np.arange(len(flat)) % 5 == 0
    classifier = SVC(C=10, gamma=0.05).fit(flat[~held_out], labels[~held_out])
    accuracy = float(classifier.score(flat[held_out], labels[held_out]))
    if accuracy < LEAST_ACCURACY:
        raise RuntimeError(f"the classifier reads only {accuracy:.1%} of held-out digits, 97 % are expected")
    return classifier, accuracy


class DigitExtractor:
    """The 64 pixels of 8x8 images, and the labels that :func:`digit_classifier` reads.

    Samples come as they are, (n, 8, 8, 1) float32 around [-1, 1], neither rounded nor clipped. 8-bit images are taken
    for the 17 grey levels that the real digits have.
    """

    name = "64 pixels of 8x8 digits"

    def __call__(self, images: np.ndarray) -> Extracted:
        """Features of images; ValueError for images that are not 8x8."""
        if images.ndim != 4 or images.shape[1:3] != (8, 8):
            raise ValueError(f"the protocol digits takes images of 8x8 pixels, got {images.shape[1:3]}")
        if images.dtype == np.uint8:
            images = np.round(images.mean(3, keepdims=True) * 16 / 255) / 8 - 1
        return Extracted(images.mean(3).reshape(len(images), 64).astype(np.float32), None)

    def read(self, images: np.ndarray) -> np.ndarray:
        """The labels of images, (n,) int64."""
        labels: np.ndarray = digit_classifier()[0].predict(self(images).features)
        return labels
