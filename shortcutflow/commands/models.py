"""Commands that turn models of one format into another: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the released JAX code, a pickle.")],
    out: Annotated[Path, typer.Option(help="The model's folder to write.")],
    heads: Annotated[int | None, typer.Option(help="Of attention. [default: found from the file]")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of a sample. [default: the usual one]")] = None,
    finest_steps: Annotated[int, typer.Option(help="The training's denoise_timesteps.")] = 128,
) -> None:
    """Turn a checkpoint of the released JAX code into safetensors and a config, without JAX."""
    from shortcutflow.interop.convert import convert

    config, notes = convert(checkpoint, out, heads=heads, image_size=image_size, finest_steps=finest_steps)
    for note in notes:
        print(f"assumed {note}")
    print(f"{out}: {config.backbone.name} {config.backbone.options}, samples {config.shape}, step {config.step}")


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
