"""From a model's or a run's folder to what other code reads, compared with the library's own sampler first."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.interop.exportable import TOLERANCE, ExportableSampler
from shortcutflow.interop.to_onnx import write_onnx
from shortcutflow.io.atomic import atomic_output
from shortcutflow.models.model import load

METADATA_FILE = "shortcutflow.json"
"""What a .pt2 file holds beside the program, see :meth:`ExportableSampler.metadata`."""


class Format(NamedTuple):
    """The end of a file's name, the packages that write it, and the extra that installs them."""

    suffix: str
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS: Mapping[str, Format] = {
    "diffusers": Format("", ("diffusers",), "latents"),
    "onnx": Format(".onnx", ("onnx", "onnxscript"), "onnx"),
    "torch": Format(".pt2"),
}
"""A diffusers pipeline, ONNX, torch.export. Steps and guidance are options of the last two, which fix them."""


def export_model(
    folder: Path,
    out: Path,
    format: str,
    *,
    weights: str | None = None,
    steps: int | Sequence[float] | None = None,
    guidance_scale: float | None = None,
    decoder: str | None = None,
) -> str:
    """Write a model in a format that other code reads; returns a summary in one line.

    ONNX and .pt2 files are functions (noise, y) -> samples: ``noise`` (batch, *shape) float32 and, if the model has
    conditions, ``y``: labels (batch,) int64 or (batch, *condition_shape) float32.

    Args:
        folder: a model folder or run folder.
        out: the file or folder, which must not exist; it appears when it is complete and compared.
        format: one of :data:`FORMATS`.
        weights: which of the folder's weights; None takes the config's.
        steps: a number of steps, or step sizes that add up to 1; None is one step.
        guidance_scale: of classifier-free guidance; None is none.
        decoder: folder or hub id of the autoencoder whose latents the samples are, whose decoder goes along.

    Raises:
        ValueError: for an unknown format or an option that it does not have, a network that cannot be traced, steps or
            guidance that the model cannot do, an autoencoder of other latents, or if what was written gives other
            samples than the library.
        ImportError: without the packages that the format needs.
        FileExistsError: if something of that name exists.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    suffix, packages, extra = FORMATS[format]
    fixed = {"steps": steps, "guidance_scale": guidance_scale}
    if format == "diffusers" and (wrong := [name for name, value in fixed.items() if value is not None]):
        raise ValueError(f"format {format!r} has no option {', '.join(wrong)}; its options: weights, decoder")
    if suffix and out.suffix != suffix:
        raise ValueError(f"--out {out}: the name of a file of format {format!r} must end in {suffix}")
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f"format {format!r} needs {' and '.join(missing)}: pip install 'shortcutflow[{extra}]'")
    with atomic_output(out) as path:
        model = load(folder, weights=weights)
        autoencoder = None
        if decoder is not None:
            autoencoder = load_autoencoder(decoder, expect=model.config.latents, other_decoder=True)
            if len(model.shape) != 3 or model.shape[0] != autoencoder.latent_channels:
                raise ValueError(
                    f"--decoder {decoder} decodes latents of {autoencoder.latent_channels} channels; this model makes "
                    f"samples of shape {model.shape}"
                )
        if format == "diffusers":
            from shortcutflow.interop.diffusers_pipeline import pipeline_difference, write_pipeline

            what = "a diffusers pipeline"
            write_pipeline(model, autoencoder, path)
            found: float | None = pipeline_difference(model, path)
        else:
            steps = [1] if steps is None else steps
            if not isinstance(steps, int) and len(steps) == 1 and steps[0] == int(steps[0]):
                steps = int(steps[0])  # as the command line gives a number of steps
            sampler = ExportableSampler(
                model, steps=steps, guidance_scale=1.0 if guidance_scale is None else guidance_scale,
                autoencoder=autoencoder,
            )  # fmt: skip
            what = f"{len(sampler.sizes)}-step sampler"
            run = write_onnx(sampler, path) if format == "onnx" else _write_program(sampler, path)
            found = None if run is None else sampler.difference(run)
        if found is not None and not found <= TOLERANCE:
            raise ValueError(
                f"what was written gives other samples than the library's sampler, by {found:.2g} ({TOLERANCE:g} is "
                "allowed), so it was thrown away: a defect of the export, or a network that magnifies rounding errors"
            )
    compared = "not compared with the library's sampler, as onnxruntime is not installed"
    if found is not None:
        compared = f"differs from the library's sampler by {found:.1g} at most"
    if model.config.vae is not None and decoder is None:
        compared += f"; its samples are latents of {model.config.vae}, for images give --decoder"
    return f"{out}: {what}, {compared}"


def _write_program(sampler: ExportableSampler, path: Path) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Write a .pt2 file of torch.export, which PyTorch runs without this library; returns what runs it."""
    program = sampler.trace()
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(sampler.metadata(), indent=2)})
        # It unpickles; this file was written a moment ago.
        return torch.export.load(path).module()
