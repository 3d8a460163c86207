"""The size of a released network, read from its arrays and from its optimizer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shortcutflow.interop.released.names import KEY, LABELS, PATCHES, QUERY, check_names, depth_of, entries
from shortcutflow.interop.released.stored_array import StoredArray

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, StoredArray]

FEATURES, LOG_VARIANCES = 256, 256
BROKEN = 0.05
"""Share of a law's terms that may differ between gradients of several steps; wrong heads differ by a half and more."""
PAPER_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width to heads of the DiT paper's sizes, which the released networks have."""


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the arrays tell.

    Attributes:
        width, depth: of the transformer.
        hidden: units of a block's perceptron.
        patch: its side.
        channels: of a sample.
        num_classes: labels, without the null label.
    """

    width: int
    depth: int
    hidden: int
    patch: int
    channels: int
    num_classes: int


def read_sizes(shapes: Shapes) -> Sizes:
    """The sizes, after checking that every parameter of such a network is there, has its shape, and no other is.

    Raises:
        ValueError: naming the parameter that is missing, unknown or of another shape.
    """
    depth = depth_of(shapes)
    check_names(shapes, {name for entry in entries(depth) for name in entry.theirs})
    kernel, labels = shapes[f"{PATCHES}/kernel"], shapes[LABELS]
    perceptron = shapes["DiTBlock_0/MlpBlock_0/Dense_0/bias"] if depth else (1,)
    if len(kernel) != 4 or len(labels) != 2 or len(perceptron) != 1:
        raise ValueError(f"{PATCHES}/kernel of shape {kernel} and {LABELS} of shape {labels} are of no such network")
    sizes = Sizes(kernel[3], depth, perceptron[0], kernel[0], kernel[2], labels[0] - 1)
    if depth < 1 or min(sizes.width, sizes.hidden, sizes.patch, sizes.channels, sizes.num_classes) < 1:
        raise ValueError(f"sizes must be at least 1: {sizes}")
    if sizes.width % 4:
        raise ValueError(f"a width of {sizes.width} is no multiple of 4, which its positions need")
    for name, shape in expected_shapes(sizes).items():
        if shapes[name] != shape:
            raise ValueError(f"parameter {name} has shape {shapes[name]}; the others make it {shape}")
    return sizes


def expected_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, by flax name."""
    w, values = sizes.width, sizes.patch**2 * sizes.channels
    kernels: dict[str, tuple[int, ...]] = {
        PATCHES: (sizes.patch, sizes.patch, sizes.channels, w),
        "FinalLayer_0/Dense_0": (w, 2 * w),
        "FinalLayer_0/Dense_1": (w, values),
    }
    for i in range(2):
        kernels |= {f"TimestepEmbedder_{i}/Dense_0": (FEATURES, w), f"TimestepEmbedder_{i}/Dense_1": (w, w)}
    for i in range(sizes.depth):
        block = f"DiTBlock_{i}"
        kernels |= {f"{block}/Dense_{j}": (w, w) for j in range(1, 5)}
        kernels |= {f"{block}/Dense_0": (w, 6 * w)}
        kernels |= {f"{block}/MlpBlock_0/Dense_0": (w, sizes.hidden), f"{block}/MlpBlock_0/Dense_1": (sizes.hidden, w)}
    shapes: dict[str, tuple[int, ...]] = {LABELS: (sizes.num_classes + 1, w), "Embed_0/embedding": (LOG_VARIANCES, 1)}
    for name, kernel in kernels.items():
        shapes |= {f"{name}/kernel": kernel, f"{name}/bias": kernel[-1:]}
    return shapes


def heads_from_moments(params: Arrays, moments: Arrays, sizes: Sizes) -> int | None:
    """The number of heads, from Adam's mean gradients; None if they do not tell (all zero, or not gradients).

    Attention depends on queries Q = X W_q + b_q and keys K of a head only through Q K^T, which Q -> Q A, K -> K A^-T
    leaves alone for any invertible A. So the loss L is stationary along all of these, which reads, head by head,
    (dL/dW_k)^T W_k = W_q^T dL/dW_q + b_q (dL/db_q)^T. Channels of different heads are under no such law: the largest
    groups of channels that obey it are the heads. For the mean over ten steps it holds to about the change of
    the weights meanwhile, 1e-6 of the whole against 0.6 for wrong groups in a checkpoint of the released code.
    """
    laws = []
    for i in range(sizes.depth):
        block = f"DiTBlock_{i}"
        key, query = f"{block}/{KEY}/kernel", f"{block}/{QUERY}/kernel"
        bias = f"{block}/{QUERY}/bias"
        left = moments[key].read().T @ params[key].read()
        right = params[query].read().T @ moments[query].read()
        right += np.outer(params[bias].read(), moments[bias].read())
        laws.append((left, right))
    wrong = np.inf
    for heads in range(1, sizes.width + 1):
        if sizes.width % heads:
            continue
        broken = _broken_share(laws, heads)
        if broken is None:
            return None
        if broken < BROKEN:
            # Noise would break the law a little more for each larger group; heads break it all at once.
            return heads if wrong > 5 * broken else None
        wrong = min(wrong, broken)
    return None


def _broken_share(laws: Sequence[tuple[np.ndarray, np.ndarray]], heads: int) -> float | None:
    """How much the two sides of the laws differ, as a share of their squares; None if there is nothing to compare."""
    broken = whole = 0.0
    for left, right in laws:
        a, b = _diagonal_blocks(left, heads), _diagonal_blocks(right, heads)
        broken += float(np.square(a - b).sum(dtype=np.float64))
        whole += float(np.square(a).sum(dtype=np.float64) + np.square(b).sum(dtype=np.float64))
    return broken / whole if 0 < whole < np.inf else None


def ignores_step_size(moments: Arrays) -> bool:
    """Whether training never told the network a step size, as the released code's baselines do.

    The embedding's last 128 features are sines of the level; the gradient of their weights is exactly zero if the level
    was always 0, and only then.
    """
    gradient = moments["TimestepEmbedder_1/Dense_0/kernel"].read()
    return bool(np.any(gradient[: FEATURES // 2])) and not np.any(gradient[FEATURES // 2 :])


def usual_heads(width: int) -> int:
    """Heads by convention: the DiT paper's for its widths; else of 64 channels from width 256 on, of 16 below."""
    if width in PAPER_HEADS:
        return PAPER_HEADS[width]
    size = 64 if width >= 256 else 16
    return width // size if width % size == 0 else 1


def usual_image_size(sizes: Sizes) -> int:
    """Side of a sample by convention: 32 for latents and 256 for pictures at the DiT paper's widths; else small."""
    if sizes.width not in PAPER_HEADS:
        return max(8, 4 * sizes.patch)
    return 32 if sizes.channels == 4 else 256


def _diagonal_blocks(matrix: np.ndarray, heads: int) -> np.ndarray:
    """(w, w) to (heads, w/heads, w/heads)."""
    size = len(matrix) // heads
    return np.stack([matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(heads)])
