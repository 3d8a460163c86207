"""A model's sampler with fixed steps as one module: noise and labels in, samples or pictures out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Generator as RandomNumbers
from torch import Tensor, nn
from torch.export import ExportedProgram

from shortcutflow import __version__
from shortcutflow.data.autoencoder import Autoencoder, load_autoencoder
from shortcutflow.guidance import null_like, require_scale
from shortcutflow.interop.exports.decoder import Decoder, check_decodes
from shortcutflow.interop.exports.traced import trace
from shortcutflow.interop.model import Model, load_folder
from shortcutflow.sampling import sample
from shortcutflow.schedule import step_sizes
from shortcutflow.types import Network

TOLERANCE = 1e-4
"""Largest difference to the library's sampler that is accepted, over the largest sample or 1."""


class Generator(nn.Module):
    """The sampler of a model, for a fixed number of steps.

    Args:
        model: on the CPU.
        steps: a number of steps, or step sizes that add up to 1.
        guidance_scale: of classifier-free guidance; 1 is none.
        autoencoder: that makes pictures of the samples, or None.

    Raises:
        ValueError: for steps or a guidance scale that the model cannot do, or an autoencoder of other latents.
    """

    def __init__(
        self,
        model: Model,
        *,
        steps: int | Sequence[float] = 1,
        guidance_scale: float = 1.0,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        super().__init__()
        config = model.config
        self.sizes = step_sizes(steps, config.finest_steps)
        if config.sampler == "consistency" and len(self.sizes) > 1:
            raise ValueError(
                f"this model's sampler ('consistency') adds noise between its steps, which a file with "
                f"{len(self.sizes)} steps cannot draw: export 1 step, or --format diffusers"
            )
        if require_scale(guidance_scale) != 1 and (not conditional(model) or config.null_y is None):
            raise ValueError(f"guidance_scale {guidance_scale:g} needs a model with conditions and a null condition")
        if autoencoder is not None:
            check_decodes(autoencoder, config.shape)
        self.model, self.steps, self.guidance_scale = model, steps, guidance_scale
        self.network, self.autoencoder = model.network, autoencoder
        self.decoder = None if autoencoder is None else Decoder(autoencoder)

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples (b, *shape), or their pictures in [-1, 1], of noise (b, *shape) and conditions y."""
        config = self.model.config
        net: Network = self.network if self.guidance_scale == 1 else self._guided
        samples = sample(
            net, noise, y, steps=self.steps, finest_steps=config.finest_steps, flow_only=config.flow_only,
            sampler=config.sampler,
        )  # fmt: skip
        return samples if self.decoder is None else self.decoder(samples)

    def _guided(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        """As :func:`shortcutflow.guidance.guided_velocity`, whose halves of a free number of rows cannot be traced."""
        assert y is not None  # or the scale had to be 1
        null = null_like(y, self.model.config.null_y)
        if self.guidance_scale == 0:
            return self.network(x_t, t, d, null)
        v = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([d, d]), torch.cat([y, null]))
        with_y, with_null = v[: len(x_t)], v[len(x_t) :]
        return with_null + self.guidance_scale * (with_y - with_null)

    def trace(self) -> ExportedProgram:
        """Its graph, for any number of samples: noise, and y if the model has conditions.

        Raises:
            ValueError: if the network cannot be traced.
        """
        return trace(self, inputs_of(self.model, 1), what=f"backbone {self.model.config.backbone.name!r}")

    def expected(self, noise: Tensor, y: Tensor | None) -> Tensor:
        """What the library itself makes of noise and y, without any of the code above."""
        samples = self.model.sample(noise, y, steps=self.steps, guidance_scale=self.guidance_scale)
        return samples if self.autoencoder is None else self.autoencoder.decode(samples)

    def metadata(self) -> dict[str, str]:
        """What a user of the file must know, each as JSON."""
        config = self.model.config
        facts = {
            "steps": len(self.sizes), "step_sizes": self.sizes, "guidance_scale": self.guidance_scale,
            "finest_steps": config.finest_steps, "shape": config.shape, "num_classes": config.num_classes,
            "condition_shape": config.condition_shape, "null_label": null_condition(self.model),
            "value_range": [-1, 1] if self.decoder is not None or config.vae is None else None,
            "latents_of": None if self.decoder is not None else config.vae, "sampler": config.sampler,
            "backbone": config.backbone.name, "weights": self.model.weights, "training_step": config.step,
        }  # fmt: skip
        return {"producer": f"shortcutflow {__version__}"} | {name: json.dumps(fact) for name, fact in facts.items()}

    def check(self, run: Callable[[Tensor, Tensor | None], Tensor]) -> float:
        """Compare ``run(noise, y)``, which runs the file that was written, with the library's sampler.

        Returns:
            The largest difference, over the largest sample or 1.

        Raises:
            ValueError: if it is above :data:`TOLERANCE`.
        """
        tried = [inputs_of(self.model, rows) for rows in (1, 4)]
        return require_same(max(difference(run(noise, y), self.expected(noise, y)) for noise, y in tried))


def load_generator(
    folder: Path,
    *,
    weights: str | None = None,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    decoder: str | None = None,
) -> Generator:
    """A model's or a run's folder as :class:`Generator`; ``decoder`` is an autoencoder's folder or hub id."""
    model = load_folder(folder, weights=weights)
    autoencoder = None
    if decoder is not None:
        autoencoder = load_autoencoder(decoder, expect=model.config.latents, other_decoder=True)
    return Generator(model, steps=steps, guidance_scale=guidance_scale, autoencoder=autoencoder)


def conditional(model: Model) -> bool:
    """Whether its network takes labels or other conditions."""
    return model.config.num_classes is not None or model.config.condition_shape is not None


def null_condition(model: Model) -> float | None:
    """What y is without a condition: the null label as a whole number, the number a tensor is filled with, or None."""
    config = model.config
    if config.num_classes is not None:
        return config.num_classes if config.null_y is None else int(config.null_y)
    return None if config.condition_shape is None else (config.null_y or 0.0)


def inputs_of(model: Model, rows: int) -> tuple[Tensor, Tensor | None]:
    """Noise (rows, *shape) and conditions to try a model with, always the same; labels include the null label."""
    config, numbers = model.config, RandomNumbers().manual_seed(rows)
    noise = torch.randn(rows, *config.shape, generator=numbers)
    if config.num_classes is not None:
        return noise, (torch.arange(rows) + config.num_classes - 1) % (config.num_classes + 1)
    if config.condition_shape is not None:
        return noise, torch.randn(rows, *config.condition_shape, generator=numbers)
    return noise, None


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected number or 1; infinity for another shape or NaN."""
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def require_same(found: float) -> float:
    """Give a difference back, or raise ValueError if it is above :data:`TOLERANCE`."""
    if not found <= TOLERANCE:
        raise ValueError(
            f"what was written gives other samples than the library's sampler, by {found:.2g} ({TOLERANCE:g} is "
            "allowed), so it was thrown away: a defect of the export, or a network that magnifies rounding errors"
        )
    return found
