"""A model's sampler as a .pt2 file of torch.export, which PyTorch runs without this library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shortcutflow.interop.exports.exportable import ExportableSampler, without_warnings
from shortcutflow.io.atomic import atomic_output

METADATA_FILE = "shortcutflow.json"
"""What the file holds beside the program, see :meth:`ExportableSampler.metadata`."""


def export_program(
    folder: Path,
    out: Path,
    *,
    weights: str | None = None,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    decoder: str | None = None,
) -> str:
    """Write (noise, y) -> samples for a fixed number of steps; returns a summary in one line.

    Args:
        folder: a model folder or run folder.
        out: the file, .pt2, which must not exist; it appears when it is complete and compared.
        weights: which of the folder's weights; None takes the config's.
        steps: a number of steps, or step sizes that add up to 1.
        guidance_scale: of classifier-free guidance; 1 is none.
        decoder: an autoencoder's folder or hub id, to write images instead of latents.

    Raises:
        ValueError: if the network cannot be traced, the model cannot do the steps or the guidance, or the file gives
            other samples than the library.
        FileExistsError: if the file exists.
    """
    if out.suffix != ".pt2":
        raise ValueError(f"--out {out}: the name of a program must end in .pt2")
    with atomic_output(out) as path:
        sampler = ExportableSampler.load(
            folder, weights=weights, steps=steps, guidance_scale=guidance_scale, decoder=decoder
        )
        program = sampler.trace()
        with without_warnings():
            torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(sampler.metadata(), indent=2)})
            # It unpickles; this file was written a moment ago.
            again = torch.export.load(path).module()

        def run(noise: Tensor, y: Tensor | None) -> Tensor:
            with torch.no_grad():
                return again(noise, y)

        found = sampler.check(run)
    return f"{out}: {len(sampler.sizes)}-step sampler, differs from the library's sampler by {found:.1g} at most"
