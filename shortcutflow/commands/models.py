"""Commands that turn models of one format into another: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def convert_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint of the released JAX code (a pickle), of SiT or DiT (.pt), or a diffusers folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model's folder to write.")],
    kind: Annotated[str | None, typer.Option(help="sit or dit, if the name of a .pt does not tell.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of attention. [default: found, or the usual number]")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of a sample. [default: the usual one]")] = None,
    finest_steps: Annotated[int, typer.Option(help="M, the training's denoise_timesteps.")] = 128,
) -> None:
    """Turn the authors' checkpoints, or pretrained flow and diffusion models, into safetensors and a config."""
    from shortcutflow.interop.convert import convert
    from shortcutflow.interop.pretrained import convert_pretrained, is_pretrained

    sizes: dict[str, Any] = {"heads": heads, "image_size": image_size, "finest_steps": finest_steps}
    if is_pretrained(checkpoint):
        # A word here; what it may be is checked where it is used.
        config, notes = convert_pretrained(checkpoint, out, **(sizes | {"kind": kind}))
    elif kind is not None:
        raise ValueError(f"--kind is for .pt files of SiT and DiT, {checkpoint} is none")
    else:
        config, notes = convert(checkpoint, out, **sizes)
    for note in notes:
        print(f"assumed {note}")
    step = "" if config.step is None else f", step {config.step}"
    print(f"{out}: {config.backbone.name} {config.backbone.options}, samples {config.shape}{step}")


def export_command(
    folder: Annotated[Path, typer.Argument(help="A model's or a run's folder.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[str, typer.Option(help="jax: a checkpoint of the released code.")] = "jax",
) -> None:
    """Write a model in a format that other code reads."""
    from shortcutflow.interop.export import export_jax

    if format != "jax":
        raise ValueError(f"unknown format {format!r}; known: jax")
    print(export_jax(folder, out))
