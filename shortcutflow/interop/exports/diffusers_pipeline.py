"""A diffusers pipeline of a shortcut model: one network that samples in any number of steps.

>>> pipe = DiffusionPipeline.from_pretrained("DIR or hub id", trust_remote_code=True)
>>> images = pipe(class_labels=[207, 360], num_inference_steps=4, guidance_scale=1.5).images

It needs torch and diffusers alone, 0.39 or later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from shortcutflow.schedule import step_sizes


class ShortcutPipeline(DiffusionPipeline):
    """From noise to samples.

    Args:
        network: s(x_t, t, d, y), the average velocity over [t, t + d] from noise (t = 0) to data (t = 1).
        scheduler: which walks from 1 (noise) to 0 along velocities of the other sign.
        vae: the autoencoder whose latents the network makes, or None.
    """

    model_cpu_offload_seq = "network->vae"
    _optional_components = ["vae"]  # noqa: RUF012
    network: Any
    scheduler: Any
    vae: Any
    # What the base class gives, whose types are not known here.
    _execution_device: Any
    register_modules: Any
    maybe_free_model_hooks: Any
    progress_bar: Any

    def __init__(
        self, network: ModelMixin, scheduler: FlowMapEulerDiscreteScheduler, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
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
            batch_size: how many samples, if nothing else tells.
            generator: where noise comes from.
            latents: the noise itself, (b, *sample_shape).
            output_type: "pil", "np" or "pt" for pictures in [0, 1]; "latent" for what the network makes. None is "pil"
                if there are pictures, or else "latent".
            return_dict: give an ImagePipelineOutput, or a tuple.

        Raises:
            ValueError: for numbers of samples that differ, labels out of range, or what this model cannot do.
        """
        output_type = self._output_type(output_type)
        sizes = step_sizes(num_inference_steps, self.network.config.finest_steps)
        count = self._count(class_labels, condition, latents, batch_size)
        y = self._conditions(class_labels, condition, count)
        if guidance_scale != 1 and y is None:
            raise ValueError(f"guidance_scale {guidance_scale:g}: this model has no conditions to guide by, so it is 1")
        x_t = self._noise(latents, count, generator)
        x_t = self._walk(x_t, y, sizes, guidance_scale, generator)
        images = x_t if output_type == "latent" else self._pictures(x_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _walk(self, x_t: Tensor, y: Tensor | None, sizes: list[float], scale: float, generator: Any) -> Tensor:
        """Steps of these sizes; x_t (b, *sample_shape)."""
        config, total, times = self.network.config, len(sizes), [0.0]
        for i, size in enumerate(sizes):
            # Equal steps are counted, not added up, so that t is i/N to the last bit.
            times.append(min((i + 1) * size if len(set(sizes)) == 1 else times[-1] + size, 1.0))
        self.scheduler.set_timesteps(sigmas=[1 - t for t in times[:-1]], device=x_t.device)
        steps = list(zip(times, sizes, self.scheduler.timesteps, strict=False))
        for i, (t, size, timestep) in enumerate(self.progress_bar(steps)):
            told = 0.0 if config.flow_only else size
            if config.sampler == "consistency" and not config.flow_only:
                told = 1 - t
            if config.sampler == "live_reflow" and not config.flow_only and total < config.finest_steps:
                told = 1.0
            v = self._velocity(x_t, t, told, y, scale)
            if config.sampler == "consistency":
                x_t = self.scheduler.step(-v, timestep, x_t, r_timestep=0.0, return_dict=False)[0]
                if i + 1 < total:
                    fresh = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
                    x_t = self.scheduler.scale_noise(x_t, self.scheduler.timesteps[i + 1], fresh)
            else:
                x_t = self.scheduler.step(-v, timestep, x_t, return_dict=False)[0]
        return x_t

    def _velocity(self, x_t: Tensor, t: float, d: float, y: Tensor | None, scale: float) -> Tensor:
        """s(x_t, t, d, y) with classifier-free guidance: s_null + scale (s_y - s_null)."""
        null = None if y is None else torch.full_like(y, self.network.config.null_condition)
        if scale in (0, 1) or y is None or null is None:
            time, told = (torch.full((len(x_t),), value, device=x_t.device) for value in (t, d))
            return self.network(x_t, time, told, null if scale == 0 else y).to(x_t.dtype)
        time, told = (torch.full((2 * len(x_t),), value, device=x_t.device) for value in (t, d))
        with_y, with_null = self.network(torch.cat([x_t, x_t]), time, told, torch.cat([y, null])).chunk(2)
        return (with_null + scale * (with_y - with_null)).to(x_t.dtype)

    def _output_type(self, asked: str | None) -> str:
        shape = self.network.config.sample_shape
        pictures = len(shape) == 3 and (self.vae is not None or shape[0] in (1, 3))
        if asked not in (None, "pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {asked!r}")
        if asked not in (None, "latent") and not pictures:
            latents_of = self.network.config.latents_of
            hint = f"; they are latents of {latents_of}, load it and pass it as vae=" if latents_of else ""
            raise ValueError(
                f"output_type {asked!r}: samples of shape {tuple(shape)} are no pictures, so it must be 'latent'{hint}"
            )
        return asked or ("pil" if pictures else "latent")

    def _count(self, class_labels: Any, condition: Tensor | None, latents: Tensor | None, asked: int | None) -> int:
        """How many samples there are to be."""
        told = {"batch_size": asked}
        for name, rows in (("class_labels", class_labels), ("condition", condition), ("latents", latents)):
            told[name] = None if rows is None or isinstance(rows, int) else len(rows)
        counts = {name: number for name, number in told.items() if number is not None}
        if len(set(counts.values())) > 1 or any(number < 1 for number in counts.values()):
            raise ValueError(f"there must be as many of each, and at least 1: {counts}")
        return next(iter(counts.values()), 1)

    def _conditions(self, class_labels: Any, condition: Tensor | None, count: int) -> Tensor | None:
        """y of the network, on its device; the null condition if none is given."""
        config, device = self.network.config, self._execution_device
        if class_labels is not None and config.num_classes is None:
            raise ValueError("class_labels: this model has no labels")
        if condition is not None and config.condition_shape is None:
            raise ValueError("condition: this model is not conditioned on tensors")
        if config.num_classes is not None:
            labels = config.null_condition if class_labels is None else class_labels
            y = torch.as_tensor(labels, dtype=torch.int64, device=device).expand(count)
            if not (y.min() >= 0 and y.max() <= config.num_classes):
                raise ValueError(f"labels must be from 0 to {config.num_classes} (none), got {y.tolist()}")
            return y
        if config.condition_shape is None:
            return None
        shape = (count, *config.condition_shape)
        y = torch.full(shape, config.null_condition) if condition is None else condition
        if tuple(y.shape) != shape:
            raise ValueError(f"condition must have shape {shape}, got {tuple(y.shape)}")
        return y.to(device, torch.float32)

    def _noise(self, latents: Tensor | None, count: int, generator: Any) -> Tensor:
        shape, device = (count, *self.network.config.sample_shape), self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, torch.float32)

    def _pictures(self, x: Tensor, output_type: str) -> Any:
        """Pictures of samples in [-1, 1], or of scaled latents."""
        if self.vae is not None:
            unscaled = x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            x = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0].float()
        return self.image_processor.postprocess(x, output_type=output_type)
