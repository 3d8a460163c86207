"""Features of images: any network behind any resize, a TorchScript file, or the pixels themselves."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from shortcutflow.evaluation.features.resize import Prepare, unresized
from shortcutflow.evaluation.features.weights_files import HeldFile, read_file

BATCH_SIZE = 64
"""Images that go through a network at once."""
MOST_PIXEL_VALUES = 4096
LARGEST = 4 * 2**30
"""Bytes of a TorchScript file, packed and unpacked."""


class Extracted(NamedTuple):
    """What an extractor finds in n images.

    Attributes:
        features: (n, k) float32, finite.
        logits: (n, classes) float32, before the softmax, for the Inception score; None if there are no classes.
            Probabilities are refused there: give their logarithms.
    """

    features: np.ndarray
    logits: np.ndarray | None


class Extractor(Protocol):
    """Images (n, h, w, 3) uint8 of any size to features, resized as the protocol says.

    Attributes:
        name: for reports; different for everything that changes the features, with the SHA-256 of a file of weights.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, images: np.ndarray) -> Extracted: ...


class NetworkExtractor:
    """A network behind a resize; while it computes on one batch, the next is resized.

    The numbers do not depend on how many images are given at once, but for the last digits.

    Args:
        network: a batch as ``prepare`` made it, on ``device``, to features (b, k), or to (features, logits).
        prepare: images (b, h, w, 3) uint8 to a tensor with b rows, on the CPU; by default (b, 3, h, w) uint8.
        name: for reports; another one for another network or another way of resizing.
        device: where the network is.
        batch_size: images at once.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        prepare: Prepare = unresized,
        *,
        name: str,
        device: torch.device | str = "cpu",
        batch_size: int = BATCH_SIZE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.name = name
        self._network, self._prepare, self._device, self._batch_size = network, prepare, device, batch_size

    def __call__(self, images: np.ndarray) -> Extracted:
        """See :class:`Extractor`.

        Raises:
            ValueError: for other images, or if the network's answer is no finite (n, k).
        """
        check_images(images)
        answers = [self._answer(batch) for batch in self._prepared(images)]
        features = np.concatenate([features for features, _ in answers])
        logits = [logits for _, logits in answers if logits is not None]
        return Extracted(features, np.concatenate(logits) if logits else None)

    def _prepared(self, images: np.ndarray) -> Iterator[Tensor]:
        batches = np.array_split(images, range(self._batch_size, len(images), self._batch_size))
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as ahead:
            pending = ahead.submit(self._prepare, batches[0])
            for following in batches[1:]:
                ready, pending = pending, ahead.submit(self._prepare, following)
                yield ready.result()
            yield pending.result()

    @torch.no_grad()
    def _answer(self, batch: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        with exact_float32():
            try:
                answer = self._network(batch.to(self._device))
            except (RuntimeError, AttributeError, TypeError) as error:
                # TorchScript says where it happened first, and last what happened.
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise ValueError(f"extractor {self.name} fails on images {tuple(batch.shape)}: {reason}") from error
        features, logits = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
        found = self._checked("features", features, len(batch))
        return found, None if logits is None else self._checked("logits", logits, len(batch))

    def _checked(self, what: str, values: Any, rows: int) -> np.ndarray:
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != rows:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"extractor {self.name} must return {what} ({rows}, k), it returned {shape}")
        if not values.isfinite().all():
            raise ValueError(f"extractor {self.name} returned {what} that are not finite")
        return values.float().cpu().numpy()


def extractor_of_file(
    path: Path | str, *, device: torch.device | str = "cpu", batch_size: int = BATCH_SIZE
) -> NetworkExtractor:
    """An extractor from what ``torch.jit.save`` wrote; its name holds the file's SHA-256.

    The module takes images (b, 3, h, w) float32 in [0, 255] to features (b, k), or to (features, logits). Errors are
    those of :func:`load_torchscript`, and FileNotFoundError.
    """
    file = read_file(Path(path), LARGEST)
    module, name = load_torchscript(file, device), f"file:{file.path.name} sha256:{file.sha256}"
    return NetworkExtractor(lambda images: module(images.float()), name=name, device=device, batch_size=batch_size)


def load_torchscript(file: HeldFile, device: torch.device | str = "cpu") -> Any:
    """The module of a TorchScript file, in evaluation mode and without gradients.

    Such a file is a program of tensor operations. Python's pickle never sees it, so it names no Python function to
    call; but it computes what it likes, may read and write files, and torch warns of files that are made to break its
    loader. So it is only as trustworthy as where it came from, and results name it by its SHA-256.

    Raises:
        ValueError: if it is no TorchScript archive, would unpack to more than 4 GiB, or cannot be loaded.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(
            f"{file.path} is no TorchScript file, which is a zip archive: {error}; torch.jit.save writes one"
        ) from error
    if not any("/code/" in member.filename for member in members):
        raise ValueError(
            f"{file.path} is an archive without code, such as torch.save writes: a pickle, which is never loaded; "
            "save the network with torch.jit.save(torch.jit.trace(network, example), path)"
        )
    if (size := sum(member.file_size for member in members)) > LARGEST:
        raise ValueError(f"{file.path} would unpack to {size} bytes; at most {LARGEST} are allowed")
    try:
        # torch.export, which torch recommends instead, does not read the published files.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            module = torch.jit.load(io.BytesIO(file.content), map_location=device)
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file.path} cannot be loaded as TorchScript: {reason}") from error
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


class PixelExtractor:
    """The values of small images themselves, in [-1, 1], row by row, the three channels of a pixel side by side."""

    name = "pixels"

    def __call__(self, images: np.ndarray) -> Extracted:
        """See :class:`Extractor`; ValueError for images of more than 4096 values."""
        check_images(images)
        if (values := images[0].size) > MOST_PIXEL_VALUES:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} have {values} values, pixels are compared up to "
                f"{MOST_PIXEL_VALUES}: take a protocol with a network, such as clean-fid"
            )
        return Extracted(images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1, None)


def check_images(images: np.ndarray) -> None:
    """Raise ValueError unless images are (n, h, w, 3) uint8 with n, h and w at least 1."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images must be (n, h, w, 3) uint8, got {images.shape} {images.dtype}")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions in full float32 with algorithms that repeat, so a GPU's features are a CPU's; restored at the end.

    By torch's newer switches alone: it refuses to read ``allow_tf32`` once anybody has set ``fp32_precision``.
    """
    cudnn: Any = torch.backends.cudnn
    switches: list[tuple[Any, str, Any]] = [
        (cudnn.conv, "fp32_precision", "ieee"),
        (cudnn, "enabled", True), (cudnn, "deterministic", True), (cudnn, "benchmark", False),
    ]  # fmt: skip
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, value in switches:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)
