"""Checkpoints of other codes as a model folder: the authors' JAX code, SiT, DiT, and diffusers' DiT and U-Net.

A flow or diffusion network gives, for every step size, the velocity x_1 - x_0 of the original model; its step-size
embedding contributes zero and can learn. So training starts from the flow model, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shortcutflow import __version__
from shortcutflow.config import CURRENT
from shortcutflow.interop.conversion import Conversion, ReadTensor
from shortcutflow.interop.diffusers_folder import downloaded, read_folder
from shortcutflow.interop.dit_sit import Kind, read_dit_sit
from shortcutflow.interop.jax_checkpoint import read_jax_checkpoint
from shortcutflow.interop.torch_file import is_torch_file
from shortcutflow.io.atomic import atomic_dir, require_absent
from shortcutflow.io.safetensors import TensorSpec, write_tensors
from shortcutflow.models.config import ModelConfig, weights_file
from shortcutflow.models.model import is_hub_id
from shortcutflow.schedule import levels_of
from shortcutflow.seeds import seed_for


class Converted(NamedTuple):
    """The config that was written, and a line for each thing that the source does not say and was assumed."""

    config: ModelConfig
    notes: tuple[str, ...]


def convert(
    source: Path,
    out: Path,
    *,
    kind: Kind | None = None,
    heads: int | None = None,
    image_size: int | None = None,
    finest_steps: int = 128,
) -> Converted:
    """Write a checkpoint of another code as a model folder; nothing in it is run, little of it is in memory at a time.

    Args:
        source: a pickle of the authors' JAX code; a ``.pt`` or ``.safetensors`` file of SiT or DiT; a folder of
            diffusers (a pipeline, a model, a checkpoint of its training scripts, a repository in the hub's cache); or a
            hub id of such a folder.
        out: the folder, which must not exist or be empty; it appears when it is complete.
        kind: "sit" or "dit", for a torch file whose name does not say.
        heads: of attention, for a file; None takes the usual number for its hidden size.
        image_size: side of a sample (of latents: 32 for 256 pixels); None takes what the source says, or the usual one.
        finest_steps: M of the training, which no source says.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        FileExistsError: if ``out`` holds something.
        ValueError: in one line, if it is no such model, is damaged, or is of a kind that is not supported.
    """
    require_absent(out)
    levels_of(finest_steps)
    conversion, sets = _read(source, kind, heads, image_size)
    about = {"source": f"converted from a {conversion.source}, {source.name}", **conversion.about}
    if conversion.notes:
        about["assumed"] = "; ".join(conversion.notes)
    config = ModelConfig(
        backbone=conversion.backbone, shape=conversion.shape, num_classes=conversion.num_classes,
        null_y=conversion.num_classes, finest_steps=finest_steps, flow_only=not conversion.step_conditioned,
        weights=tuple(sets), default_weights="ema" if "ema" in sets else CURRENT, step=conversion.step,
        vae=conversion.vae, about=about,
    )  # fmt: skip
    with torch.device("meta"):
        network: Any = config.build_network()
    specs = {name: TensorSpec(tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    added = _step_embedding(network) if specs.keys() - conversion.params.keys() else {}
    if specs.keys() != conversion.params.keys() | added.keys():
        raise ValueError(
            f"the installed backbone {config.backbone.name!r} has other parameters than a {conversion.source}"
        )

    def tensors(read: ReadTensor) -> Iterator[tuple[str, Tensor]]:
        for name in specs:
            yield name, added[name] if name in added else conversion.params[name].read(read)

    step = "" if conversion.step is None else str(conversion.step)
    with atomic_dir(out) as folder:
        for name, read in sets.items():
            header = {"weights": name, "step": step, "shortcutflow": __version__}
            try:
                write_tensors(folder / weights_file(name), specs, tensors(read), metadata=header)
            except ValueError as error:
                raise ValueError(f"{source}, weights {name!r}: {error}") from None
        config.save(folder)
    return Converted(config, conversion.notes)


def _read(
    source: Path, kind: Kind | None, heads: int | None, image_size: int | None
) -> tuple[Conversion, Mapping[str, ReadTensor]]:
    if is_hub_id(source):
        source = downloaded(str(source))
    if source.is_dir():
        if kind is not None or heads is not None:
            raise ValueError(f"{source} is a folder, whose config says what it is: kind and heads are for files")
        return read_folder(source, image_size=image_size)
    if not source.is_file():
        raise FileNotFoundError(
            f"there is no file or folder {source}; a hub id is owner/name, where no folder owner is here"
        )
    if kind is not None or is_torch_file(source):
        return read_dit_sit(source, kind, heads=heads, image_size=image_size)
    return read_jax_checkpoint(source, heads=heads, image_size=image_size)


def _step_embedding(network: Any) -> dict[str, Tensor]:
    """Parameters by name of a network's embedding of d: zero for every d, with a gradient that is not."""
    embedding = network.step_embedding
    prefix = next(name for name, module in network.named_modules() if module is embedding)
    embedding.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(0, "network"))
        embedding.reset_parameters()
    nn.init.zeros_(embedding.out.weight)
    return {f"{prefix}.{name}": tensor for name, tensor in embedding.state_dict().items()}
