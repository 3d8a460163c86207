"""Folders of diffusers: a pipeline's or a model's, of ``DiTTransformer2DModel`` or ``UNet2DModel``.

::

    model_index.json                 of a pipeline only; its parts are then in transformer/ or unet/, scheduler/, vae/
    config.json                      the network's options
    diffusion_pytorch_model.*        its weights, .safetensors or .bin, in one file or with an index of several
    scheduler_config.json            the betas, and what the network predicts

A checkpoint of diffusers' training scripts has unet/ or transformer/ beside unet_ema/ or transformer_ema/, and a
repository in the hub's cache (``models--OWNER--NAME``) has such a folder below ``snapshots/``.

Only the JSON and the tensors are read. Nothing here needs diffusers itself; running its U-Net does.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.interop.conversion import Conversion, ReadTensor
from shortcutflow.interop.diffusers_params import check_ignored, current_name, describe_dit, describe_unet
from shortcutflow.interop.torch_file import read_state_dicts
from shortcutflow.io.json import read_object
from shortcutflow.models.model import download

CONFIG, INDEX, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
WEIGHTS_NAME = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>\w+))?\.(?P<format>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)
"""Weights in one file, or the index of several; a variant is a precision such as fp16."""
LONGEST_INDEX = 2**24
"""Bytes of an index; a large model names some thousand tensors."""
MODELS = ("transformer", "unet")
PREDICTS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler",
)  # fmt: skip
"""Those that are given by betas."""


def read_folder(source: Path, *, image_size: int | None = None) -> tuple[Conversion, dict[str, ReadTensor]]:
    """What a folder holds, and its weights by name: "current", and "ema" where a training script left them.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the network, its scheduler or its options are of a kind that is not supported.
    """
    source = _snapshot(source)
    folder = _model_folder(source)
    config = read_object(folder / CONFIG, "a diffusers model")
    diffusion, notes = _diffusion(source, folder)
    tensors, variant = _weights(folder)
    notes += [f"weights: those of the variant {variant}; there are no others"] if variant else []
    conversion, read = _described(folder, config, tensors, diffusion, image_size)
    vae = DEFAULT_VAE if conversion.shape[0] == 4 else None
    if (source / "vae" / CONFIG).is_file():
        vae = str((source / "vae").absolute())
    conversion = dataclasses.replace(
        conversion, notes=(*notes, *conversion.notes), vae=vae, about={"predicts": str(diffusion["predicts"])}
    )
    sets = {"current": read}
    ema = folder.with_name(f"{folder.name}_ema")
    if folder != source and (ema / CONFIG).is_file():
        sets["ema"] = _described(ema, config, _weights(ema)[0], diffusion, image_size)[1]
    return conversion, sets


def _described(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], diffusion: dict[str, Any], image_size: int | None
) -> tuple[Conversion, ReadTensor]:
    """The network of these tensors, checked."""
    try:
        match config.get("_class_name"):
            case "DiTTransformer2DModel" | "Transformer2DModel":
                conversion = describe_dit(config, tensors, diffusion, image_size)
            case "UNet2DModel":
                tensors = {current_name(name): tensor for name, tensor in tensors.items()}
                conversion = describe_unet(config, tensors, diffusion, image_size)
            case other:
                raise ValueError(f"it holds a {other!r}; known: DiTTransformer2DModel, UNet2DModel")
        conversion.check({name: tensor.shape for name, tensor in tensors.items()})
        check_ignored(tensors, conversion)
    except (ValueError, TypeError) as error:  # the second of values that are no numbers
        raise ValueError(f"{folder}: {error}") from None
    return conversion, tensors.__getitem__


def downloaded(hub_id: str) -> Path:
    """The folder of a hub repository's configs and weights, from the cache or downloaded; see :func:`download`."""
    patterns = ["*.json", "*pytorch_model*.safetensors"]
    folder = download(hub_id, allow_patterns=patterns)
    if not any(folder.rglob("*.safetensors")):
        folder = download(hub_id, allow_patterns=[*patterns, "*pytorch_model*.bin"])
    return folder


def _snapshot(source: Path) -> Path:
    """The files of a repository's folder in the hub's cache; any other folder is itself."""
    snapshots = source / "snapshots"
    if not snapshots.is_dir():
        return source
    main = source / "refs" / "main"
    if main.is_file() and (snapshots / (name := main.read_text().strip())).is_dir() and name:
        return snapshots / name
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        raise ValueError(f"{source} holds {len(found)} snapshots and no main among them: give one below {snapshots}")
    return found[0]


def _model_folder(source: Path) -> Path:
    """The folder of the network: the source itself, or its only part that is one."""
    if (source / CONFIG).is_file() and not (source / INDEX).is_file():
        return source
    found = [source / name for name in MODELS if (source / name / CONFIG).is_file()]
    if len(found) == 1:
        return found[0]
    if (source / INDEX).is_file():
        raise ValueError(f"{source} is a pipeline without one network in {' or '.join(MODELS)}/")
    files = sorted(path.name for path in source.iterdir() if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors"))
    hint = f"; it holds {files[0]}: give the file if it is SiT's or DiT's" if files else ""
    raise ValueError(
        f"{source} is no folder of a diffusers network or pipeline: there is no {CONFIG}, {INDEX}, "
        f"{' or '.join(f'{name}/{CONFIG}' for name in MODELS)} in it{hint}"
    )


def _weights(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a model's folder, and their variant if there is no plain file."""
    found = [match for path in sorted(folder.iterdir()) if (match := WEIGHTS_NAME.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(f"{folder} has no weights: no diffusion_pytorch_model.safetensors or .bin, no index")

    def rank(match: re.Match[str]) -> tuple[bool, bool, bool, bool]:
        variant = match["variant"] or match["index_variant"]
        own = match[1] == "diffusion_pytorch_model"
        return variant is not None, not own, match["format"] == "bin", match["index"] is not None

    best = min(found, key=rank)
    path, variant = folder / best[0], best["variant"] or best["index_variant"]
    if not best["index"]:
        (tensors,) = read_state_dicts(path).values()
        return tensors, variant
    placed = read_object(path, "the parts of a diffusers model", longest=LONGEST_INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(f"{path} names no files: it must hold a weight_map")
    tensors = {}
    for file in sorted(set(placed.values())):
        if file != Path(file).name:
            raise ValueError(f"{path} names {file!r}, which is not beside it")
        (part,) = read_state_dicts(folder / file).values()
        tensors |= part
    if missing := sorted(placed.keys() - tensors.keys()):
        raise ValueError(f"{path}: its files lack {', '.join(missing[:3])}")
    return tensors, variant


def _diffusion(source: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Options of ``backbones.diffusion.Diffusion``, and what was assumed."""
    places = (source / "scheduler" / SCHEDULER, folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {"predicts": "noise"}, ["schedule: DDPM's, predicting noise; there is no scheduler_config.json"]
    given = read_object(path, "a diffusers model")
    if given.get("_class_name") not in SCHEDULERS:
        raise ValueError(f"{path}: a {given.get('_class_name')!r} is not supported; known: {', '.join(SCHEDULERS)}")
    predicts = given.get("prediction_type", "epsilon")
    if predicts not in PREDICTS:
        raise ValueError(f"{path}: unknown prediction_type {predicts!r}; known: {', '.join(PREDICTS)}")
    options: dict[str, Any] = {"predicts": PREDICTS[predicts]}
    if given.get("trained_betas") is not None:
        options["betas"] = list(given["trained_betas"])
    else:
        names = {"schedule": "beta_schedule", "steps": "num_train_timesteps", "beta_start": "beta_start",
                 "beta_end": "beta_end"}  # fmt: skip
        options |= {option: given[name] for option, name in names.items() if name in given}
    if given.get("rescale_betas_zero_snr"):
        options["zero_terminal_snr"] = True
    return options, []
