"""Ways of measuring, by name. Two numbers compare only if their protocols are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shortcutflow.evaluation.features.extractors import BATCH_SIZE, Extractor, PixelExtractor, extractor_of_file

FILE_PREFIX = "file:"
DESCRIPTIONS: Mapping[str, str] = {
    "clean-fid": (
        "clean-fid's mode clean: each float channel resized to 299 by Pillow's bicubic with antialias, "
        "(x - 128) / 128, Inception 2015-12-05, 2048 pooled features; Inception score from logits without bias"
    ),
    "released-code": (
        "the shortcut models' released evaluation: 8-bit images to [-1, 1], resized to 299 bilinearly without "
        "antialias, clipped to [-1, 1], Inception 2015-12-05, 2048 pooled features"
    ),
    "adm": (
        "ADM's evaluation suite: 8-bit images resized to 299 inside the network as TensorFlow 1 did (bilinear, no "
        "antialias, corners at 0), Inception 2015-12-05, 2048 pooled features; Inception score from logits without bias"
    ),
    "adm-spatial": (
        "ADM's spatial features, whose FID is sFID: as adm, but the first 7 channels of mixed_6/conv at 17x17 places, "
        "2023 features"
    ),
    "dinov2": (
        "FD-DINOv2 as in dgm-eval: 8-bit images resized to 224 by Pillow's bicubic with antialias, ImageNet's "
        "normalisation, DINOv2 ViT-L/14 without registers, 1024 features of the class token"
    ),
    "pixels": "the values of small images in [-1, 1], three channels (a grey image counts three times)",
    "digits": (
        "the 64 pixels of 8x8 digits in [-1, 1], neither rounded nor clipped; label accuracy by a support vector "
        "classifier of 4 of 5 of the 1,797 real ones"
    ),
}
"""The protocols that are built in, a sentence for each; beside them ``file:PATH`` names a TorchScript file."""
WITHOUT_WEIGHTS = ("pixels", "digits")
"""Protocols without a network."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """A named way of measuring.

    Attributes:
        name: one of :data:`DESCRIPTIONS`, or ``file:NAME``.
        description: one sentence that says what happens to an image.
        extractor: images to features; its name holds the SHA-256 of its file of weights.
        eight_bit: samples are rounded to 8 bits before the extractor sees them, as a saved image is; otherwise it
            gets (n, h, w, 1 or 3) float32 around [-1, 1].
        classifier: the labels (n,) of such images, for the metric "label_accuracy"; None if it has none.
    """

    name: str
    description: str
    extractor: Extractor
    eight_bit: bool = True
    classifier: Callable[[np.ndarray], np.ndarray] | None = None


def open_protocol(
    name: str, *, device: torch.device | str = "cpu", weights: Path | None = None, batch_size: int = BATCH_SIZE
) -> EvaluationProtocol:
    """A protocol ready to measure: its weights are found, checked and loaded.

    Args:
        name: one of :data:`DESCRIPTIONS`, or ``file:PATH`` for a TorchScript file that takes images
            (b, 3, h, w) float32 in [0, 255] as they are and returns features (b, k), or (features, logits).
        device: where the network computes.
        weights: the file of its weights; None: looked for in the cache, and fetched if need be.
        batch_size: images that go through the network at once.

    Raises:
        ValueError: for an unknown name, weights where there are none, or a file that is not what it should be.
        OSError: if weights are nowhere and cannot be fetched; says where to put them.
        ImportError: if clean-fid or scikit-learn is needed and not installed.
    """
    # Loaded here, so that the names cost nothing.
    from shortcutflow.evaluation.features.digits import DigitExtractor, digit_classifier
    from shortcutflow.evaluation.features.dinov2 import dinov2_extractor
    from shortcutflow.evaluation.features.inception import inception_extractor

    check_protocol(name)
    if weights is not None and (name in WITHOUT_WEIGHTS or name.startswith(FILE_PREFIX)):
        raise ValueError(f"the protocol {name} takes no weights, got {weights}")
    if name.startswith(FILE_PREFIX):
        path = Path(name.removeprefix(FILE_PREFIX))
        description = f"features of the TorchScript file {path.name}, which gets the 8-bit images as floats in [0, 255]"
        extractor: Extractor = extractor_of_file(path, device=device, batch_size=batch_size)
        return EvaluationProtocol(f"{FILE_PREFIX}{path.name}", description, extractor)
    if name == "digits":
        digit_classifier()  # made now, so that what is missing is missed before there are samples
        digits = DigitExtractor()
        return EvaluationProtocol(name, DESCRIPTIONS[name], digits, eight_bit=False, classifier=digits.read)
    if name == "pixels":
        extractor = PixelExtractor()
    elif name == "dinov2":
        extractor = dinov2_extractor(device=device, weights=weights, batch_size=batch_size)
    else:
        extractor = inception_extractor(name, device=device, weights=weights, batch_size=batch_size)
    return EvaluationProtocol(name, DESCRIPTIONS[name], extractor)


def check_protocol(name: str) -> None:
    """Raise ValueError, listing the names, for one that is none; before anything is loaded."""
    if name not in DESCRIPTIONS and not (name.startswith(FILE_PREFIX) and name != FILE_PREFIX):
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(DESCRIPTIONS)}, or file:PATH")
