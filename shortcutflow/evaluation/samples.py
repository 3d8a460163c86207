"""Samples of a network as images and features: sample i depends on (seed, i) alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.evaluation.feature_set import timed
from shortcutflow.evaluation.features.extractors import Extracted
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.real_images import save_pngs
from shortcutflow.evaluation.sample_grid import to_uint8
from shortcutflow.guidance import require_scale
from shortcutflow.models.model import Model

Precision = Literal["float32", "bfloat16"]


class Sampler:
    """Makes images of a network's samples.

    Args:
        model: of images, or of latents of images.
        seed: of the noise.
        guidance_scale: 1 is none.
        batch_size: samples at once; it changes no sample beyond the last digits of a network.
        precision: "bfloat16" runs the network under autocast, as training may have done; noise and steps stay float32.
        vae: hub id or folder of the autoencoder, if not the one that the model names; its scale and shift must be
            the same.

    Attributes:
        autoencoder: that decodes latents, or None.
        side: (height, width) of an image in pixels.

    Raises:
        ValueError: for a network that makes no images, guidance without labels, or settings out of range.
        ImportError, OSError: if an autoencoder is needed and is not there.
    """

    def __init__(
        self, model: Model, *, seed: int = 0, guidance_scale: float = 1.0, batch_size: int = 250,
        precision: Precision = "float32", vae: str | Path | None = None,
    ) -> None:  # fmt: skip
        info = model.info
        if not info.is_picture:
            raise ValueError(f"{model.name} makes no images: its samples have shape {info.shape}")
        if require_scale(guidance_scale) != 1 and model.null_y is None:
            raise ValueError(f"{model.name} was trained without labels: guidance_scale is {guidance_scale}, must be 1")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if precision not in get_args(Precision):
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
        if info.vae is None and vae is not None:
            raise ValueError(f"{model.name} makes images, not latents: it needs no autoencoder, got {vae}")
        if info.vae is None and info.shape[0] not in (1, 3):
            raise ValueError(f"{model.name} makes samples of {info.shape[0]} channels: an image has 1 or 3")
        self.model, self.seed, self.guidance_scale = model, seed, guidance_scale
        self.batch_size, self.precision = batch_size, precision
        self.autoencoder: Autoencoder | None = None
        if info.vae is not None:
            self.autoencoder = load_autoencoder(
                vae or info.vae, expect=info.latents, other_decoder=vae is not None, device=model.device
            )
        scale = self.autoencoder.downsampling if self.autoencoder is not None else 1
        self.side = (info.shape[1] * scale, info.shape[2] * scale)

    def key(self, steps: int) -> dict[str, Any]:
        """Everything that determines the images, as JSON."""
        model, autoencoder = self.model, self.autoencoder
        return {
            "subject": model.identity, "shape": list(model.shape), "classes": model.num_classes,
            "sampler": model.sampler_options(), "steps": steps, "seed": self.seed,
            "guidance_scale": self.guidance_scale, "precision": self.precision,
            "vae_sha256": autoencoder.sha256 if autoencoder is not None else None,
            "device": model.device.type, "torch": torch.__version__,
        }  # fmt: skip

    def samples(self, steps: int, index: range) -> Tensor:
        """Samples by index, as the network makes them, (n, *shape) on its device; one batch."""
        model, device = self.model, self.model.device
        noise, labels = noise_of(self.seed, index, model.shape, device), labels_of(index, model.num_classes, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return generate(
                model, noise, labels, steps=steps, batch_size=len(index), guidance_scale=self.guidance_scale,
                seed=self.seed, first=index.start,
            )  # fmt: skip

    def extract(
        self, steps: int, protocol: EvaluationProtocol, folder: Path | None, index: range, seconds: dict[str, float]
    ) -> tuple[Extracted, int]:
        """The features of some samples, and how many of them the protocol's classifier reads as their label.

        Images are saved in the folder, if there is one, and the seconds of each phase added to ``seconds``. ValueError
        if a sample is not finite, naming the first.
        """
        device = self.model.device
        with timed(seconds, "sampling", device):
            samples = self.samples(steps, index)
        with timed(seconds, "decoding", device):
            bad = (~samples.flatten(1).isfinite().all(1)).nonzero().flatten()
            if len(bad):
                raise ValueError(
                    f"{len(bad)} of {len(index)} samples hold values that are not finite; the first is sample "
                    f"{index[int(bad[0])]} of seed {self.seed}"
                )
            images = samples if self.autoencoder is None else self.autoencoder.decode(samples)
            pixels = to_uint8(images) if protocol.eight_bit or folder is not None else np.zeros(0)
        if folder is not None:
            with timed(seconds, "saving"):
                save_pngs(pixels, folder, index.start)
        with timed(seconds, "extraction", device):
            if not protocol.eight_bit:
                pixels = images.float().permute(0, 2, 3, 1).cpu().numpy()
            labels = labels_of(index, self.model.num_classes)
            correct = 0
            if protocol.classifier is not None and labels is not None:
                correct = int((protocol.classifier(pixels) == labels.numpy()).sum())
            return protocol.extractor(pixels), correct
