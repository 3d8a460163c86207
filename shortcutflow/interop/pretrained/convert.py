"""Pretrained flow and diffusion models as a start: SiT, DiT, and diffusers' DiT and U-Net as a model's folder.

The folder's network gives, for every step size, the velocity x_1 - x_0 of the original model; its step-size embedding
contributes zero and can learn. So training starts from the flow model, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shortcutflow import __version__
from shortcutflow.config import CURRENT
from shortcutflow.interop.model import is_hub_id
from shortcutflow.interop.model_folder import ModelConfig, weights_file
from shortcutflow.interop.pretrained import dit_sit
from shortcutflow.interop.pretrained.diffusers_models import WEIGHTS_NAME, describe_folder, downloaded
from shortcutflow.interop.pretrained.dit_sit import Kind, check_positions, kind_of
from shortcutflow.interop.pretrained.foreign import Foreign
from shortcutflow.interop.pretrained.torch_file import is_torch_file, read_tensors
from shortcutflow.interop.released.convert import AVERAGE, Converted
from shortcutflow.io.atomic import atomic_dir, require_absent
from shortcutflow.io.safetensors import TensorSpec, write_tensors
from shortcutflow.network import build_network
from shortcutflow.schedule import levels_of
from shortcutflow.seeds import seed_for

INSIDE = {
    **dict.fromkeys(("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema"), AVERAGE),
    **dict.fromkeys(("model", "state_dict", "model_state_dict", "net", "network", "module", "params"), CURRENT),
}
"""Where training checkpoints keep their weights, and what these are called here."""
STEP = "condition.step."
"""What the names of the step size's embedding start with."""

Sets = Mapping[str, Mapping[str, Tensor]]


def is_pretrained(source: Path) -> bool:
    """Whether this looks like what :func:`convert_pretrained` reads, and not like a checkpoint of the released code."""
    return source.is_dir() or is_torch_file(source) or is_hub_id(source)


def convert_pretrained(
    source: Path,
    out: Path,
    *,
    kind: Kind | None = None,
    heads: int | None = None,
    image_size: int | None = None,
    finest_steps: int = 128,
) -> Converted:
    """Write a pretrained model as a model's folder; nothing in it is run, little of it is in memory at a time.

    Args:
        source: a ``.pt`` or ``.safetensors`` file of SiT or DiT; a folder of diffusers' (a pipeline's, a model's, a
            checkpoint of its training scripts, a repository in the hub's cache); or a hub id of such a folder.
        out: the folder, which must not exist or be empty; it appears when it is complete.
        kind: "sit" or "dit", for a file whose name does not tell.
        heads: of attention, for a file; None takes the usual number for its width.
        image_size: side of a sample (of latents: 32 for 256 pixels); None takes what the model says.
        finest_steps: M of the training to come; nothing in the weights depends on it.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        FileExistsError: if ``out`` holds something.
        ValueError: in one line, if it is no such model, is damaged, or is of a kind that is not supported.
    """
    require_absent(out)
    levels_of(finest_steps)
    foreign: Foreign
    sets: Sets
    if is_hub_id(source):
        source = downloaded(str(source))
    if source.is_dir():
        if kind is not None or heads is not None:
            raise ValueError(f"{source} is a folder, whose config tells what it is: kind and heads are for files")
        foreign, sets = describe_folder(source, image_size=image_size)
    else:
        foreign, sets = _of_file(source, kind, heads, image_size)
    config = _config(foreign, source, sets, finest_steps)
    _check_network(config, foreign)
    with atomic_dir(out) as folder:
        for name, tensors in sets.items():
            _write_weights(folder / weights_file(name), name, foreign, tensors, source, config)
        config.save(folder)
    return Converted(config, foreign.notes)


def _of_file(source: Path, kind: Kind | None, heads: int | None, image_size: int | None) -> tuple[Foreign, Sets]:
    if WEIGHTS_NAME.fullmatch(source.name) and (source.parent / "config.json").is_file():
        raise ValueError(f"{source} is described by the config.json beside it: give the folder {source.parent}")
    sets = read_tensors(source, inside=INSIDE)
    kind = kind or kind_of(source)
    try:
        first = next(iter(sets.values()))
        foreign = dit_sit.describe(first, kind, heads=heads, image_size=image_size)
        for tensors in sets.values():
            foreign.check(tensors)
            check_positions(tensors[dit_sit.POSITIONS], foreign.backbone, foreign.shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return foreign, sets


def _config(foreign: Foreign, source: Path, sets: Sets, finest_steps: int) -> ModelConfig:
    about = {"source": f"converted from a {foreign.source}, {source.name}", **foreign.about}
    if foreign.notes:
        about["assumed"] = "; ".join(foreign.notes)
    return ModelConfig(
        backbone=foreign.backbone, shape=foreign.shape, num_classes=foreign.num_classes, null_y=foreign.num_classes,
        finest_steps=finest_steps, flow_only=True, weights=tuple(sets),
        default_weights=AVERAGE if AVERAGE in sets else CURRENT, vae=foreign.vae, about=about,
    )  # fmt: skip


def _network(config: ModelConfig) -> nn.Module:
    """The network without memory."""
    with torch.device("meta"):
        return build_network(
            config.backbone,
            shape=config.shape,
            num_classes=config.num_classes,
            finest_steps=config.finest_steps,
            seed=0,
        )


def _check_network(config: ModelConfig, foreign: Foreign) -> None:
    """What does not fit is found before anything is written."""
    expected = {name: tuple(t.shape) for name, t in _network(config).state_dict().items() if not name.startswith(STEP)}
    if expected != {name: entry.our_shape() for name, entry in foreign.entries.items()}:
        raise ValueError(
            f"the installed backbone {config.backbone.name!r} has other parameters than a {foreign.source}"
        )


def _write_weights(
    path: Path, name: str, foreign: Foreign, tensors: Mapping[str, Tensor], source: Path, config: ModelConfig
) -> None:
    shapes = {ours: tuple(t.shape) for ours, t in _network(config).state_dict().items()}
    metadata = {"weights": name, "step": "", "shortcutflow": __version__}
    write_tensors(
        path, {ours: TensorSpec(shape) for ours, shape in shapes.items()}, _converted(shapes, foreign, tensors, source),
        metadata=metadata,
    )  # fmt: skip


def _converted(
    shapes: Mapping[str, tuple[int, ...]], foreign: Foreign, tensors: Mapping[str, Tensor], source: Path
) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed_for(0, "network"))
    for ours, shape in shapes.items():
        if ours.startswith(STEP):
            yield ours, _start_of_step_size(ours, shape, generator)
            continue
        entry = foreign.entries[ours]
        made = entry.of(tensors)
        if not made.isfinite().all():
            raise ValueError(f"{source}: {entry.theirs[0]} holds numbers that are not finite")
        yield ours, made


def _start_of_step_size(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The last layer is zero: no step size has an effect, and the gradient reaches that layer at once."""
    if name.startswith(f"{STEP}hidden.weight"):
        return 0.02 * torch.randn(shape, generator=generator)
    return torch.zeros(shape)
