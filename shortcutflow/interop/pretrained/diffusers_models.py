"""Folders of diffusers: a pipeline's or a model's, of ``DiTTransformer2DModel`` or ``UNet2DModel``.

::

    model_index.json                 of a pipeline only; its parts are then in transformer/ or unet/, scheduler/, vae/
    config.json                      the network's options
    diffusion_pytorch_model.*        its weights, .safetensors or .bin
    scheduler_config.json            the betas, and what the network predicts

Only the JSON and the tensors are read. Nothing here needs diffusers itself; running its U-Net does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.interop.pretrained.diffusers_names import check_unread, name_of_today, of_dit, of_unet
from shortcutflow.interop.pretrained.foreign import Foreign
from shortcutflow.interop.pretrained.torch_file import read_tensors
from shortcutflow.io.json import read_object

CONFIG, INDEX, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MODELS = ("transformer", "unet")
PREDICTS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler",
)  # fmt: skip
"""Those that are given by betas."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder is a pipeline's, or holds a network as diffusers saves one."""
    return (folder / INDEX).is_file() or any((folder / name).is_file() for name in WEIGHTS)


def describe_folder(source: Path, *, image_size: int | None = None) -> tuple[Foreign, dict[str, dict[str, Tensor]]]:
    """What a folder holds, and its tensors by name, as "current".

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the network, its scheduler or its options are of a kind that is not supported.
    """
    folder = _model_folder(source)
    config = read_object(folder / CONFIG, "a diffusers model")
    diffusion, notes = _diffusion(source, folder)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no weights: there is neither {' nor '.join(WEIGHTS)}")
    (tensors,) = read_tensors(weights).values()
    try:
        match config.get("_class_name"):
            case "DiTTransformer2DModel" | "Transformer2DModel":
                foreign = of_dit(config, tensors, diffusion, image_size)
            case "UNet2DModel":
                tensors = {name_of_today(name): tensor for name, tensor in tensors.items()}
                foreign = of_unet(config, tensors, diffusion, image_size)
            case other:
                raise ValueError(f"it holds a {other!r}; known: DiTTransformer2DModel, UNet2DModel")
        foreign.check(tensors)
        check_unread(tensors, foreign)
    except (ValueError, TypeError) as error:  # the second of values that are no numbers
        raise ValueError(f"{folder}: {error}") from None
    about = {"predicts": str(diffusion["predicts"])}
    foreign = dataclasses.replace(foreign, notes=(*notes, *foreign.notes), vae=_vae(source, foreign.shape), about=about)
    return foreign, {"current": tensors}


def _model_folder(source: Path) -> Path:
    if not (source / INDEX).is_file():
        return source
    read_object(source / INDEX, "a diffusers model")
    found = [source / name for name in MODELS if (source / name / CONFIG).is_file()]
    if len(found) != 1:
        raise ValueError(f"{source} is a pipeline without one network in {' or '.join(MODELS)}/")
    return found[0]


def _vae(source: Path, shape: tuple[int, ...]) -> str | None:
    if (source / "vae" / CONFIG).is_file():
        return str((source / "vae").absolute())
    return DEFAULT_VAE if shape[0] == 4 else None


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
        options |= {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    if given.get("rescale_betas_zero_snr"):
        options["zero_terminal_snr"] = True
    return options, []
