"""A small reader of the 8x8 digits: features and classes without any download, the same on every machine."""

from __future__ import annotations

from functools import cache

import numpy as np

from shortcutflow.data.digits import load_digits
from shortcutflow.evaluation.features.extractors import Extracted, check_images

HIDDEN = 64
SHAPES = ((64, HIDDEN), (1, HIDDEN), (HIDDEN, 10), (1, 10))
STEPS, RATE, MOMENTUM, DECAY = 100, 0.5, 0.9, 1e-3
LEAST_ACCURACY = 0.95
Weights = tuple[np.ndarray, ...]


class DigitExtractor:
    """64 tanh features and 10 logits of grey 8x8 pictures, from a perceptron trained here in a second.

    It is trained on the real digits but each fifth, on whole batches and in float64 from fixed random numbers, so
    machines differ in digits that do not matter; features are its hidden layer.

    Attributes:
        accuracy: share of the held-out fifth that it reads.

    Raises:
        ImportError: without scikit-learn, which carries the digits.
        RuntimeError: if it reads less than 95 % of the held-out digits.
    """

    name = "digits reader (64 features)"

    def __init__(self) -> None:
        self._weights, self.accuracy = _trained()
        if self.accuracy < LEAST_ACCURACY:
            raise RuntimeError(f"the digits reader reads {self.accuracy:.1%} of held-out digits, 95 % are expected")

    def __call__(self, images: np.ndarray) -> Extracted:
        """See :class:`shortcutflow.evaluation.features.extractors.Extractor`.

        Raises:
            ValueError: for pictures that are not 8x8.
        """
        check_images(images)
        if images.shape[1:3] != (8, 8):
            raise ValueError(f"the protocol digits reads 8x8 pictures, these are {images.shape[1]}x{images.shape[2]}")
        grey = images.mean(3, dtype=np.float64).reshape(len(images), 64) / 127.5 - 1
        features, logits = _forward(self._weights, grey)
        return Extracted(features.astype(np.float32), logits.astype(np.float32))


def _forward(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w1, b1, w2, b2 = weights
    features = np.tanh(x @ w1 + b1)
    return features, features @ w2 + b2


@cache
def _trained() -> tuple[Weights, float]:
    """Weights, and the share of the held-out digits that they read."""
    images, labels = load_digits()
    x, y = images.reshape(len(images), 64).astype(np.float64), labels
    held_out = np.arange(len(x)) % 5 == 0
    weights = _train(x[~held_out], np.eye(10)[y[~held_out]])
    return weights, float((_forward(weights, x[held_out])[1].argmax(1) == y[held_out]).mean())


def _train(x: np.ndarray, one_hot: np.ndarray) -> Weights:
    """Gradient descent with momentum on the cross-entropy and the squares of the weights."""
    from threadpoolctl import threadpool_limits

    # numpy's draws are the same in every version and on every machine.
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=(rows, columns)) / rows**0.5 for rows, columns in SHAPES)
    moves = [np.zeros(shape) for shape in SHAPES]
    # Several threads on such small matrices wait for each other, ten times as long on a busy machine.
    with threadpool_limits(1):
        for _ in range(STEPS):
            for weight, move, gradient in zip(weights, moves, _gradients(weights, x, one_hot), strict=True):
                move[...] = MOMENTUM * move + gradient + DECAY * weight
                weight -= RATE * move
    return weights


def _gradients(weights: Weights, x: np.ndarray, one_hot: np.ndarray) -> Weights:
    features, logits = _forward(weights, x)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    of_logits = (shares / shares.sum(1, keepdims=True) - one_hot) / len(x)
    of_hidden = of_logits @ weights[2].T * (1 - features**2)
    return x.T @ of_hidden, of_hidden.sum(0, keepdims=True), features.T @ of_logits, of_logits.sum(0, keepdims=True)
