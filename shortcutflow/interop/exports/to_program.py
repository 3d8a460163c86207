"""A model's sampler as a .pt2 file of torch.export, which PyTorch runs without this library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shortcutflow.interop.exports.generator import load_generator
from shortcutflow.interop.exports.traced import quietly
from shortcutflow.io.atomic import atomic_output

METADATA_FILE = "shortcutflow.json"
"""What the file holds beside the program, see :meth:`Generator.metadata`."""


def export_program(
    folder: Path,
    out: Path,
    *,
    weights: str | None = None,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    decoder: str | None = None,
) -> str:
    """Write (noise, y) -> samples for a fixed number of steps; gives what there is to say.

    Args:
        folder: of a model or a run.
        out: the file, .pt2, which must not exist; it appears when it is complete and gives the library's samples.
        weights: which of the folder's weights; None takes the config's.
        steps: a number of steps, or step sizes that add up to 1.
        guidance_scale: of classifier-free guidance; 1 is none.
        decoder: an autoencoder's folder or hub id, to write pictures instead of latents.

    Raises:
        ValueError: if the network cannot be traced, the model cannot do the steps or the guidance, or the file gives
            other samples than the library.
        FileExistsError: if the file exists.
    """
    if out.suffix != ".pt2":
        raise ValueError(f"--out {out}: the name of a program must end in .pt2")
    with atomic_output(out) as path:
        generator = load_generator(folder, weights=weights, steps=steps, guidance_scale=guidance_scale, decoder=decoder)
        program = generator.trace()
        with quietly():
            torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(generator.metadata(), indent=2)})
            # It unpickles; this file was written a moment ago.
            again = torch.export.load(path).module()

        def run(noise: Tensor, y: Tensor | None) -> Tensor:
            with torch.no_grad():
                return again(noise, y)

        found = generator.check(run)
    return f"{out}: {len(generator.sizes)}-step generator, differs from the library's sampler by {found:.1g} at most"
