"""Commands that turn models of one format into another: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def convert_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A pickle of the authors' JAX code, a .pt of SiT or DiT, or a diffusers folder or hub id."),
    ],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    kind: Annotated[str | None, typer.Option(help="sit or dit, if the name of a .pt does not say.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of attention. [default: usual for the hidden size]")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of a sample. [default: the usual one]")] = None,
    finest_steps: Annotated[int, typer.Option(help="M, the training's denoise_timesteps.")] = 128,
) -> None:
    """Turn the authors' checkpoints, or pretrained flow and diffusion models, into safetensors and a config."""
    from shortcutflow.interop.convert import convert

    # Any string; what it may be is checked where it is used.
    sit_or_dit: Any = kind
    config, notes = convert(
        checkpoint, out, kind=sit_or_dit, heads=heads, image_size=image_size, finest_steps=finest_steps
    )
    for note in notes:
        print(f"assumed {note}")
    step = "" if config.step is None else f", step {config.step}"
    print(f"{out}: {config.backbone.name} {config.backbone.options}, samples {config.shape}{step}")


def export_command(
    folder: Annotated[Path, typer.Argument(help="A model's or a run's folder.")],
    out: Annotated[Path, typer.Option(help="The file to write; for diffusers a folder.")],
    format: Annotated[str, typer.Option(help="diffusers, onnx or torch (torch.export).")],
    weights: Annotated[str | None, typer.Option(help="Which of the model's weights. [default: the config's]")] = None,
    steps: Annotated[
        list[float] | None, typer.Option(help="Of onnx and torch: a number of steps, or step sizes. [default: 1]")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Of onnx and torch. [default: 1, none]")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Autoencoder whose decoder goes along, for latents: a hub id or folder.")
    ] = None,
) -> None:
    """Write a model in a format that other code reads, checked against this library's own samples."""
    from shortcutflow.interop.export import export_model

    print(
        export_model(folder, out, format, weights=weights, steps=steps, guidance_scale=guidance_scale, decoder=decoder)
    )
