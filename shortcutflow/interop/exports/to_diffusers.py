"""A model as a folder that diffusers loads with :class:`shortcutflow.interop.diffusers_pipeline.ShortcutPipeline`.

::

    model_index.json                               the pipeline's parts
    network/config.json                            the model's config
    network/diffusion_pytorch_model.safetensors    its weights
    vae/                                           the autoencoder, if the samples are latents and it was given
    README.md                                      how to load it
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.interop.exports.exportable import check_decodes, difference, require_same, without_warnings
from shortcutflow.io.atomic import atomic_output
from shortcutflow.models.model import Model, load

CHECKED_STEPS = (1, 3)
"""Numbers of steps that are compared with the library's sampler before the folder appears."""

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


def export_diffusers(folder: Path, out: Path, *, weights: str | None = None, decoder: str | None = None) -> str:
    """Write a model as a pipeline's folder; returns a summary in one line.

    Args:
        folder: a model folder or run folder.
        out: the folder, which must not exist; it appears when it is complete and compared.
        weights: which of the folder's weights; None takes the config's.
        decoder: folder or hub id of the autoencoder whose latents the samples are, to be part of it.

    Raises:
        ImportError: without diffusers.
        ValueError: if the autoencoder is one of other latents, or the pipeline gives other samples than the library.
        FileExistsError: if something of that name exists.
    """
    if find_spec("diffusers") is None:
        raise ImportError("a diffusers pipeline is tried out before it is kept: pip install 'shortcutflow[latents]'")
    with atomic_output(out) as unfinished:
        model = load(folder, weights=weights)
        _write(model, unfinished, decoder)
        call = "0, " if model.num_classes is not None else ""
        (unfinished / "README.md").write_text(README.format(name=out.name, call=call))
        found = _check(model, unfinished)
    summary = f"{out}: a diffusers pipeline, differs from the library's sampler by {found:.1g} at most"
    if model.config.vae is not None and decoder is None:
        summary += f"; its samples are latents of {model.config.vae}, for images give --decoder"
    return summary


def _write(model: Model, folder: Path, decoder: str | None) -> None:
    from shortcutflow.interop.diffusers_pipeline import ShortcutNetwork, ShortcutPipeline

    vae: Any = None
    if decoder is not None:
        autoencoder = load_autoencoder(decoder, expect=model.config.latents, other_decoder=True)
        check_decodes(autoencoder, model.config.shape)
        vae = autoencoder._network
    config = model.config.model_copy(update={"weights": (model.weights,), "default_weights": model.weights})
    network = ShortcutNetwork(config.model_dump(mode="json"))
    network.network.load_state_dict(model.network.state_dict())
    with without_warnings():
        ShortcutPipeline(network, vae).save_pretrained(folder)


def _check(model: Model, folder: Path) -> float:
    """The largest difference of the written pipeline's samples to the library's; ValueError if they are others."""
    from shortcutflow.interop.diffusers_pipeline import ShortcutPipeline

    with without_warnings():
        pipeline: Any = ShortcutPipeline.from_pretrained(folder)
    found = 0.0
    for rows, steps in enumerate(CHECKED_STEPS, start=1):
        noise, y = model.example_inputs(rows)
        inputs = {"class_labels" if model.num_classes is not None else "condition": y}
        scale = 1.5 if steps > 1 and model.is_conditional and model.null_y is not None else 1.0
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        samples = pipeline(
            latents=noise, num_inference_steps=steps, guidance_scale=scale, generator=generators[0],
            output_type="latent", return_dict=False, **inputs,
        )[0]  # fmt: skip
        expected = model.sample(noise, y, steps=steps, guidance_scale=scale, generator=generators[1])
        found = max(found, difference(samples, expected))
    return require_same(found)
