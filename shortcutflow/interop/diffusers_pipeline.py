"""A model as a diffusers pipeline: one network that samples in any number of steps.

>>> from shortcutflow.interop.diffusers_pipeline import ShortcutPipeline
>>> pipe = ShortcutPipeline.from_pretrained("DIR or hub id")
>>> images = pipe(class_labels=[207, 360], num_inference_steps=4, guidance_scale=1.5).images
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from shortcutflow.data.autoencoder import Autoencoder
from shortcutflow.interop.exportable import difference, example_inputs
from shortcutflow.models.config import ModelConfig
from shortcutflow.models.model import Model

README = """---
library_name: diffusers
tags:
- shortcut-models
- few-step
---
# {name}

A shortcut model: one network that samples in any number of steps. Needs `shortcutflow` and diffusers:

```python
from shortcutflow.interop.diffusers_pipeline import ShortcutPipeline

pipe = ShortcutPipeline.from_pretrained("DIR or hub id")
images = pipe({call}num_inference_steps=4).images
```

Nothing in this repository is code: the config names a network of the installed library, the weights are safetensors.
It computes in float32; `torch.autocast` works.
"""


class ShortcutNetwork(ModelMixin, ConfigMixin):
    """A network s(x_t, t, d, y) as a model of diffusers, in float32.

    Args:
        model: a :class:`ModelConfig` as JSON: what network it is, and what sampling it takes.
    """

    @register_to_config
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.model_config = ModelConfig.model_validate(model)
        self.network = self.model_config.build_network()

    @property
    def guidance_input(self) -> bool:
        """Whether the network takes the guidance scale as an input; see ``shortcutflow.guidance``."""
        return getattr(self.network, "guidance_input", False)

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any = None) -> Tensor:
        """The average velocity over [t, t + d] for x_t (b, *shape), t and d (b,), y labels (b,) or a tensor."""
        return self.network(x_t, t, d, y)


class ShortcutPipeline(DiffusionPipeline):
    """From noise to samples.

    Args:
        network: the network with its sampler's settings.
        vae: the autoencoder whose latents the network makes, or None.
    """

    model_cpu_offload_seq = "network->vae"
    _optional_components = ["vae"]  # noqa: RUF012
    network: Any
    vae: Any
    # What the base class gives, whose types are not known here.
    _execution_device: Any
    register_modules: Any
    maybe_free_model_hooks: Any
    save_pretrained: Any

    def __init__(self, network: ShortcutNetwork, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_inference_steps: int | Sequence[float] = 1,
        guidance_scale: float = 1.0,
        *,
        condition: Tensor | None = None,
        batch_size: int | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Draw samples.

        Args:
            class_labels: one for each sample, or one for all; num_classes is no label, and so is None.
            num_inference_steps: a number of steps, or step sizes that add up to 1; one step costs one evaluation.
            guidance_scale: of classifier-free guidance; 1 is none, and a sample then costs half.
            condition: (b, *condition_shape), for a network with such conditions instead of labels.
            batch_size: how many samples, if nothing else says so.
            generator: where noise comes from; a list has one for each sample's initial noise.
            latents: the noise itself, (b, *shape).
            output_type: "pil", "np" or "pt" for images in [0, 1]; "latent" for what the network makes. None is "pil"
                if there are images, or else "latent".
            return_dict: return an ImagePipelineOutput, or a tuple.

        Raises:
            ValueError: for numbers of samples that differ, labels out of range, or what this model cannot do.
        """
        config: ModelConfig = self.network.model_config
        device = self._execution_device
        if self.network.dtype != torch.float32:
            raise ValueError(f"this network computes in float32, not {self.network.dtype}; use torch.autocast for less")
        output_type = self._output_type(output_type)
        count = _count(batch_size, class_labels=class_labels, condition=condition, latents=latents)
        y = self._conditions(class_labels, condition, count)
        if latents is None:
            latents = randn_tensor((count, *config.shape), generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != (count, *config.shape):
            raise ValueError(f"latents must have shape {(count, *config.shape)}, got {tuple(latents.shape)}")
        x = Model(self.network, config, config.default_weights, Path()).sample(
            latents.to(device, torch.float32), y, steps=num_inference_steps, guidance_scale=guidance_scale,
            generator=generator[0] if isinstance(generator, list) else generator,
        )  # fmt: skip
        if output_type != "latent" and self.vae is not None:
            x = x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            x = self.vae.decode(x.to(self.vae.dtype), return_dict=False)[0].float()
        if output_type != "latent":
            x = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)

    def _output_type(self, output_type: str | None) -> str:
        config = self.network.model_config
        images = len(config.shape) == 3 and (self.vae is not None or config.shape[0] in (1, 3))
        if output_type not in (None, "pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if output_type not in (None, "latent") and not images:
            hint = f"; they are latents of {config.vae}, load it and pass it as vae=" if config.vae else ""
            raise ValueError(
                f"output_type {output_type!r}: samples of shape {config.shape} are no images, give 'latent'{hint}"
            )
        return output_type or ("pil" if images else "latent")

    def _conditions(self, class_labels: Any, condition: Tensor | None, count: int) -> Tensor | None:
        """y (count, ...), or None if none is given."""
        config, device = self.network.model_config, self._execution_device
        if class_labels is not None and config.num_classes is None:
            raise ValueError("class_labels: this model has no labels")
        if class_labels is not None:
            return torch.as_tensor(class_labels, dtype=torch.int64, device=device).expand(count)
        if condition is None:
            return None
        if config.condition_shape is None:
            raise ValueError("condition: this model is not conditioned on tensors")
        if tuple(condition.shape) != (shape := (count, *config.condition_shape)):
            raise ValueError(f"condition must have shape {shape}, got {tuple(condition.shape)}")
        return condition.to(device, torch.float32)


def _count(batch_size: int | None, **given: Any) -> int:
    """How many samples there are to be; raises ValueError if the arguments contradict each other."""
    counts = {name: len(value) for name, value in given.items() if value is not None and not isinstance(value, int)}
    if batch_size is not None:
        counts["batch_size"] = batch_size
    if len(set(counts.values())) > 1 or any(count < 1 for count in counts.values()):
        raise ValueError(f"there must be as many of each, and at least 1: {counts}")
    return next(iter(counts.values()), 1)


def write_pipeline(model: Model, autoencoder: Autoencoder | None, folder: Path) -> None:
    """Write a model as a pipeline's folder, with the autoencoder whose latents its samples are, if it is given::

    model_index.json                               the pipeline's parts
    network/config.json                            the model's config
    network/diffusion_pytorch_model.safetensors    its weights
    vae/                                           the autoencoder
    README.md                                      how to load it
    """
    config = model.config.model_copy(update={"weights": (model.weights,), "default_weights": model.weights})
    network = ShortcutNetwork(config.model_dump(mode="json"))
    network.network.load_state_dict(model.network.state_dict())
    with warnings.catch_warnings(action="ignore"):
        ShortcutPipeline(network, None if autoencoder is None else autoencoder._network).save_pretrained(folder)
    call = "0, " if model.num_classes is not None else ""
    (folder / "README.md").write_text(README.format(name=folder.name, call=call))


def pipeline_difference(model: Model, folder: Path) -> float:
    """The largest difference of a written pipeline's samples to the library's, as :func:`difference`."""
    with warnings.catch_warnings(action="ignore"):
        pipeline: Any = ShortcutPipeline.from_pretrained(folder)
    found = []
    for rows, steps, scale in ((1, 1, 1.0), (2, 3, 1.0 if model.null_y is None else 1.5)):
        noise, y = example_inputs(model, rows)
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        (samples,) = pipeline(
            latents=noise, num_inference_steps=steps, guidance_scale=scale, generator=generators[0],
            output_type="latent", return_dict=False,
            **{"class_labels" if model.num_classes is not None else "condition": y},
        )  # fmt: skip
        expected = model.sample(noise, y, steps=steps, guidance_scale=scale, generator=generators[1])
        found.append(difference(samples, expected))
    return max(found)
