"""A model's sampler with fixed steps as one module: noise and conditions in, samples or images out, and its graph."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F

from shortcutflow import __version__
from shortcutflow.data.autoencoder import Autoencoder
from shortcutflow.guidance import require_scale
from shortcutflow.models.model import Model
from shortcutflow.sampling import sample
from shortcutflow.schedule import step_sizes

TOLERANCE = 1e-4
"""Largest difference to the library's sampler that is accepted, over the largest sample or 1."""
PYTORCH = ("aten", "prim", "prims")
"""Namespaces of operators that come with PyTorch."""
_ROWS = 3
"""Of the inputs a module is traced with; any number but 0 and 1, which the tracer takes for constants."""


class ExportableSampler(nn.Module):
    """The sampler of a model, for a fixed number of steps.

    Args:
        model: on the CPU.
        steps: a number of steps, or step sizes that add up to 1.
        guidance_scale: of classifier-free guidance; 1 is none.
        autoencoder: that makes images of the samples, or None.

    Raises:
        ValueError: for steps or a guidance scale that the model cannot do.
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
        self.sizes = step_sizes(steps, model.finest_steps)
        if model.config.sampler == "consistency" and len(self.sizes) > 1:
            raise ValueError(
                f"this model's sampler ('consistency') adds noise between its steps, which a file with "
                f"{len(self.sizes)} steps cannot draw: export 1 step, or --format diffusers"
            )
        if require_scale(guidance_scale) != 1 and model.null_y is None:
            raise ValueError(f"guidance_scale {guidance_scale:g} needs a model with conditions and a null condition")
        self.model, self.steps, self.guidance_scale = model, steps, guidance_scale
        self.network, self.autoencoder = model.network, autoencoder
        self.decoder = None if autoencoder is None else _Decoder(autoencoder)

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples (b, *shape), or their images in [-1, 1], of noise (b, *shape) and conditions y."""
        samples = sample(
            self.network, noise, y, steps=self.steps, guidance_scale=self.guidance_scale,
            **self.model.sampler_options(),
        )  # fmt: skip
        return samples if self.decoder is None else self.decoder(samples)

    def trace(self) -> ExportedProgram:
        """Its graph; see :func:`trace`."""
        return trace(self, example_inputs(self.model, 1), what=f"backbone {self.model.config.backbone.name!r}")

    def metadata(self) -> dict[str, str]:
        """What a user of the file must know, each as JSON."""
        config = self.model.config
        null_label = None
        if config.num_classes is not None:
            null_label = config.num_classes if config.null_y is None else int(config.null_y)
        facts = {
            "steps": len(self.sizes), "step_sizes": self.sizes, "guidance_scale": self.guidance_scale,
            "finest_steps": config.finest_steps, "shape": config.shape, "num_classes": config.num_classes,
            "condition_shape": config.condition_shape, "null_label": null_label,
            "value_range": [-1, 1] if self.decoder is not None or config.vae is None else None,
            "latents_of": None if self.decoder is not None else config.vae, "sampler": config.sampler,
            "backbone": config.backbone.name, "weights": self.model.weights, "training_step": config.step,
        }  # fmt: skip
        return {"producer": f"shortcutflow {__version__}"} | {name: json.dumps(fact) for name, fact in facts.items()}

    def expected(self, noise: Tensor, y: Tensor | None) -> Tensor:
        """What the library's own sampler makes of noise and y."""
        samples = self.model.sample(noise, y, steps=self.steps, guidance_scale=self.guidance_scale)
        return samples if self.autoencoder is None else self.autoencoder.decode(samples)

    @torch.no_grad()
    def difference(self, run: Callable[[Tensor, Tensor | None], Tensor]) -> float:
        """The largest difference of ``run(noise, y)``, which runs the file that was written, to the library's sampler.

        Relative to the largest expected number, or to 1.
        """
        inputs = [example_inputs(self.model, rows) for rows in (1, 4)]
        return max(difference(run(noise, y), self.expected(noise, y)) for noise, y in inputs)


class _Decoder(nn.Module):
    """Scaled latents (b, c, h, w) to images in [-1, 1]: the numbers of :meth:`Autoencoder.decode`."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        network: Any = autoencoder._network
        self.first, self.decoder = network.post_quant_conv, network.decoder
        self.scale, self.shift = autoencoder.scaling_factor, autoencoder.shift_factor

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scale + self.shift
        return self.decoder(latents if self.first is None else self.first(latents)).clamp(-1, 1)


def example_inputs(model: Model, rows: int) -> tuple[Tensor, Tensor | None]:
    """Noise (rows, *shape) and conditions to try a model with, always the same; labels include the null label."""
    generator = torch.Generator().manual_seed(rows)
    noise, config = torch.randn(rows, *model.shape, generator=generator), model.config
    if config.num_classes is not None:
        return noise, (torch.arange(rows) + config.num_classes - 1) % (config.num_classes + 1)
    if config.condition_shape is not None:
        return noise, torch.randn(rows, *config.condition_shape, generator=generator)
    return noise, None


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected number or 1; infinity for another shape or NaN."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def trace(module: nn.Module, inputs: Sequence[Tensor | None], *, what: str) -> ExportedProgram:
    """The graph of a module on the CPU, of PyTorch's own operators, for any number of samples, without gradients.

    The inputs are its arguments with one row a sample, any number of them; None stays None.

    Raises:
        ValueError: if it cannot be traced, or calls operators that are not PyTorch's own.
    """
    rows = [None if x is None else x[:1].expand(_ROWS, *x.shape[1:]).contiguous() for x in inputs]
    batch = Dim("batch", min=1)
    free = tuple(None if x is None else {0: batch} for x in rows)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad(), _for_any_batch():
            # Strict: only the compiler's tracer follows len(x) of a free number of samples.
            program = torch.export.export(module, tuple(rows), dynamic_shapes=free, strict=True)
    except Exception as error:  # whatever a network's own code and the tracer come up with
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be traced by torch.export: {reason[:400]}") from error
    foreign = set()
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
            # Names of source files on this machine, which would be written into the file.
            node.meta.pop("stack_trace", None)
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in PYTORCH:
                foreign.add(str(node.target))
    if foreign:
        raise ValueError(
            f"{what} calls {', '.join(sorted(foreign))}, which exists only where its package is installed; its network "
            "must use PyTorch's own operators when torch.compiler.is_exporting() is true"
        )
    return program


@contextmanager
def _for_any_batch() -> Iterator[None]:
    """Exchange what diffusers' ``Upsample2D`` computes for the same, whatever the number of samples.

    diffusers' own looks at that number, and at the size of a batch, and rearranges memory from 64 samples on; a graph
    of it would end there.
    """
    upsample: Any = getattr(sys.modules.get("diffusers.models.upsampling"), "Upsample2D", None)
    if upsample is None:  # nothing of diffusers is in use
        yield
        return
    original = upsample.forward

    def forward(self: Any, x: Tensor, output_size: Sequence[int] | None = None, *more: Any, **options: Any) -> Tensor:
        if self.norm is not None or not self.interpolate or self.use_conv_transpose or self.name != "conv":
            return original(self, x, output_size, *more, **options)
        scale = 2.0 if output_size is None else None
        x = F.interpolate(x, size=output_size, scale_factor=scale, mode="nearest")
        return x if self.conv is None else self.conv(x)

    upsample.forward = forward
    try:
        yield
    finally:
        upsample.forward = original
