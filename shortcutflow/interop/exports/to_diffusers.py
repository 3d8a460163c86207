"""A model as a folder that diffusers loads and samples, without this library: JSON, safetensors and two Python files.

::

    model_index.json                               the pipeline's parts
    shortcut_pipeline.py                           the sampler
    network/config.json                            what the sampler must know of the network
    network/shortcut_network_HASH.py               the network as lines of PyTorch's operators
    network/diffusion_pytorch_model.safetensors    its weights
    scheduler/scheduler_config.json                diffusers' own FlowMapEulerDiscreteScheduler
    vae/                                           the autoencoder, if the samples are latents and it was given
    README.md                                      how to load it
"""

from __future__ import annotations

import inspect
import json
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shortcutflow import __version__
from shortcutflow.data.autoencoder import CONFIG_FILE, WEIGHTS_FILE, load_autoencoder
from shortcutflow.interop.exports.decoder import check_decodes
from shortcutflow.interop.exports.generator import (
    conditional,
    difference,
    inputs_of,
    null_condition,
    require_same,
)  # fmt: skip
from shortcutflow.interop.exports.graph_source import CLASS, module_name, source_of
from shortcutflow.interop.exports.traced import quietly, trace
from shortcutflow.interop.model import Model, load_folder
from shortcutflow.io.atomic import atomic_output
from shortcutflow.schedule import levels_of, step_sizes

PIPELINE, PIPELINE_CLASS = "shortcut_pipeline", "ShortcutPipeline"
IMPORTED = "from shortcutflow.schedule import step_sizes\n"
"""The one line of the pipeline's file that needs this library; an exported folder has the function itself instead."""
CHECKED_STEPS = (1, 3)
"""Budgets that are compared with the library's sampler before the folder appears."""

README = """---
library_name: diffusers
tags:
- shortcut-models
- few-step
---
# {name}

A shortcut model: one network that samples in any number of steps. diffusers 0.39 or later loads it:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("DIR or hub id", trust_remote_code=True)
images = pipe({call}num_inference_steps=4).images
```

`trust_remote_code` is needed because `{pipeline}.py` and `network/*.py` are code of this folder: the sampler, and the
network as lines of PyTorch's operators. Weights are safetensors. It computes in float32; `torch.autocast` works.
"""


def export_diffusers(folder: Path, out: Path, *, weights: str | None = None, decoder: str | None = None) -> str:
    """Write a model as a pipeline's folder; gives what there is to say.

    Args:
        folder: of a model or a run.
        out: the folder, which must not exist; it appears when it is complete and gives the library's samples.
        weights: which of the folder's weights; None takes the config's.
        decoder: folder or hub id of the autoencoder whose latents the samples are, to be part of it.

    Raises:
        ImportError: without diffusers.
        ValueError: if the network cannot be traced, the autoencoder is one of other latents, or the pipeline gives
            other samples than the library.
        FileExistsError: if something of that name exists.
    """
    if find_spec("diffusers") is None:
        raise ImportError("a diffusers pipeline is tried out before it is kept: pip install 'shortcutflow[latents]'")
    with atomic_output(out) as room:
        model = load_folder(folder, weights=weights)
        room.mkdir()
        network_module = _write_network(model, room / "network")
        if decoder is not None:
            _write_autoencoder(decoder, model, room / "vae")
        _write_rest(model, room, network_module, out.name, with_vae=decoder is not None)
        found = _check(model, room, network_module)
    said = f"{out}: a diffusers pipeline, differs from the library's sampler by {found:.1g} at most"
    if model.config.vae is not None and decoder is None:
        said += f"; its samples are latents of {model.config.vae}, for pictures give --decoder"
    return said


def _write_network(model: Model, folder: Path) -> str:
    """The network's source, weights and config; gives the name of its module."""
    config = model.config
    noise, y = inputs_of(model, 1)
    program = trace(
        model.network, (noise, torch.zeros(1), torch.zeros(1), y), what=f"backbone {config.backbone.name!r}"
    )
    source, tensors = source_of(program, backbone=config.backbone.name, version=__version__)
    module = module_name(source)
    folder.mkdir()
    (folder / f"{module}.py").write_text(source)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, {
        "_class_name": CLASS, "_diffusers_version": _diffusers_version(),
        "sample_shape": config.shape, "num_classes": config.num_classes, "condition_shape": config.condition_shape,
        "null_condition": null_condition(model), "finest_steps": config.finest_steps, "flow_only": config.flow_only,
        "sampler": config.sampler, "latents_of": config.vae,
    })  # fmt: skip
    return module


def _write_autoencoder(name: str, model: Model, folder: Path) -> None:
    autoencoder = load_autoencoder(name, expect=model.config.latents, other_decoder=True)
    check_decodes(autoencoder, model.config.shape)
    network: Any = autoencoder._network
    network.save_pretrained(folder, safe_serialization=True)


def _write_rest(model: Model, folder: Path, network_module: str, name: str, *, with_vae: bool) -> None:
    (folder / f"{PIPELINE}.py").write_text(pipeline_source())
    _write_json(folder / "model_index.json", {
        "_class_name": [PIPELINE, PIPELINE_CLASS], "_diffusers_version": _diffusers_version(),
        "network": [network_module, CLASS],
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if with_vae else [None, None],
    })  # fmt: skip
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler/scheduler_config.json", {
        "_class_name": "FlowMapEulerDiscreteScheduler", "_diffusers_version": _diffusers_version(),
        "num_train_timesteps": 1000, "shift": 1.0,
    })  # fmt: skip
    labels = "class_labels=0, " if model.config.num_classes is not None else ""
    (folder / "README.md").write_text(README.format(name=name, call=labels, pipeline=PIPELINE))


def pipeline_source() -> str:
    """The pipeline's file, with the rule of step sizes in place of its import."""
    text = Path(__file__).with_name("diffusers_pipeline.py").read_text()
    rule = "\n\n".join(inspect.getsource(function) for function in (levels_of, step_sizes))
    assert text.count(IMPORTED) == 1
    return (
        text.replace(IMPORTED, "")
        .replace("from collections.abc", "import math\nfrom collections.abc", 1)
        .replace("\n\nclass ", f"\n\n{rule}\n\nclass ", 1)
    )


def _check(model: Model, folder: Path, network_module: str) -> float:
    """The largest difference of the written pipeline's samples to the library's; ValueError if they are others."""
    from diffusers import FlowMapEulerDiscreteScheduler

    with quietly():
        network = getattr(_imported(folder / "network" / f"{network_module}.py"), CLASS)
        pipeline = getattr(_imported(folder / f"{PIPELINE}.py"), PIPELINE_CLASS)(
            network=network.from_pretrained(folder / "network", low_cpu_mem_usage=False),
            scheduler=FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        )
    pipeline.set_progress_bar_config(disable=True)
    found = 0.0
    for rows, steps in enumerate(CHECKED_STEPS, start=1):
        noise, y = inputs_of(model, rows)
        given: dict[str, Tensor | None] = {"class_labels" if model.num_classes is not None else "condition": y}
        scale = 1.5 if steps > 1 and conditional(model) and model.null_y is not None else 1.0
        numbers = [torch.Generator().manual_seed(0) for _ in range(2)]
        got = pipeline(
            latents=noise, num_inference_steps=steps, guidance_scale=scale, generator=numbers[0],
            output_type="latent", return_dict=False, **given,
        )[0]  # fmt: skip
        expected = model.sample(noise, y, steps=steps, guidance_scale=scale, generator=numbers[1])
        found = max(found, difference(got, expected))
    return require_same(found)


def _imported(path: Path) -> ModuleType:
    """A Python file of the folder as a module that nothing else can import, leaving no compiled file."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def _diffusers_version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
