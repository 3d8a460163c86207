"""Samples of a subject as pictures and features, part by part: sample i depends on (seed, i) alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.evaluation.clock import Clock
from shortcutflow.evaluation.drawing.grids import to_uint8
from shortcutflow.evaluation.features.extractors import Extractor
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.parts_on_disk import Features, joined
from shortcutflow.evaluation.pictures import png_path, save_pngs
from shortcutflow.evaluation.subject import Subject
from shortcutflow.guidance import require_scale

Precision = Literal["float32", "bfloat16"]


class Sampler:
    """Makes pictures of a subject's samples.

    Args:
        subject: a network of pictures, or of latents of pictures.
        seed: of the noise.
        guidance_scale: 1 is none.
        batch_size: samples at once; it changes no sample beyond the last digits of a network.
        precision: "bfloat16" runs the network under autocast, as training may have done; noise and steps stay float32.
        vae: hub id or folder of the autoencoder, if not the one that the subject names; its scale and shift must be
            the same.

    Attributes:
        autoencoder: that decodes latents, or None.
        side: (height, width) of a picture in pixels.

    Raises:
        ValueError: for a subject that makes no pictures, guidance without labels, or settings out of range.
        ImportError, OSError: if an autoencoder is needed and is not there.
    """

    def __init__(
        self, subject: Subject, *, seed: int = 0, guidance_scale: float = 1.0, batch_size: int = 250,
        precision: Precision = "float32", vae: str | Path | None = None,
    ) -> None:  # fmt: skip
        info = subject.info
        if not info.is_picture:
            raise ValueError(f"{subject.name} makes no pictures: its samples have shape {info.shape}")
        if require_scale(guidance_scale) != 1 and subject.null_y is None:
            raise ValueError(
                f"{subject.name} was trained without labels: guidance_scale is {guidance_scale}, must be 1"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if precision not in get_args(Precision):
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
        if info.vae is None and vae is not None:
            raise ValueError(f"{subject.name} makes pictures, not latents: it needs no autoencoder, got {vae}")
        if info.vae is None and info.shape[0] not in (1, 3):
            raise ValueError(f"{subject.name} makes samples of {info.shape[0]} channels: a picture has 1 or 3")
        self.subject, self.seed, self.guidance_scale = subject, seed, guidance_scale
        self.batch_size, self.precision = batch_size, precision
        self.autoencoder: Autoencoder | None = None
        if info.vae is not None:
            self.autoencoder = load_autoencoder(
                vae or info.vae, expect=info.latents, other_decoder=vae is not None, device=subject.device
            )
        scale = self.autoencoder.downsampling if self.autoencoder is not None else 1
        self.side = (info.shape[1] * scale, info.shape[2] * scale)

    def key(self, steps: int) -> dict[str, Any]:
        """Everything that determines the pictures, as JSON."""
        subject, autoencoder = self.subject, self.autoencoder
        return {
            "subject": dict(subject.identity), "shape": list(subject.info.shape), "classes": subject.info.num_classes,
            "sampler": subject.sampler_options(), "steps": steps, "seed": self.seed,
            "guidance_scale": self.guidance_scale, "precision": self.precision,
            "vae_sha256": autoencoder.sha256 if autoencoder is not None else None,
            "device": subject.device.type, "torch": torch.__version__,
        }  # fmt: skip

    def samples(self, steps: int, numbers: range) -> Tensor:
        """Samples of these numbers, as the network makes them, (n, *shape) on its device; one batch."""
        subject = self.subject
        noise = noise_of(self.seed, numbers, subject.info.shape, subject.device)
        labels = labels_of(numbers, subject.info.num_classes, subject.device)
        rounded = torch.autocast(subject.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        with rounded:
            return generate(
                subject.network, noise, labels, steps=steps, batch_size=len(numbers),
                guidance_scale=self.guidance_scale, seed=self.seed, first=numbers.start, **subject.sampler_options(),
            )  # fmt: skip

    def pictures(self, samples: Tensor, numbers: range) -> np.ndarray:
        """Samples as pictures (n, h, w, 3) uint8, latents decoded.

        Raises:
            ValueError: if a sample is not finite, naming the first.
        """
        finite = samples.flatten(1).isfinite().all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten()
            raise ValueError(
                f"{len(bad)} of {len(numbers)} samples hold values that are not finite; the first is sample "
                f"{numbers[int(bad[0])]} of seed {self.seed}"
            )
        return to_uint8(samples if self.autoencoder is None else self.autoencoder.decode(samples))

    def part(
        self, steps: int, part: range, extractor: Extractor, say: Callable[[int], object], images: Path | None = None
    ) -> Features:
        """The features of a part's samples.

        Args:
            steps: of the sampler.
            part: numbers of the samples.
            extractor: that sees their pictures.
            say: told the number of samples done, batch by batch.
            images: a folder to save the pictures in.
        """
        clock, made = Clock(self.subject.device), []
        for start in range(part.start, part.stop, self.batch_size):
            numbers = range(start, min(start + self.batch_size, part.stop))
            with clock.phase("sampling"):
                samples = self.samples(steps, numbers)
            with clock.phase("decoding"):
                pixels = self.pictures(samples, numbers)
            if images is not None:
                with clock.phase("saving"):
                    save_pngs(pixels, images, start)
            with clock.phase("extraction"):
                extracted = extractor(pixels)
            made.append(Features(extracted.features, extracted.logits, {}))
            say(len(numbers))
        return joined(made)._replace(seconds=clock.seconds)


def images_are_there(images: Path, part: range) -> bool:
    """Whether the pictures of a part were saved before."""
    return all(png_path(images, number).is_file() for number in part)
