"""The command that turns raw pictures into shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.distributed import Rank


def prepare_command(
    source: Annotated[Path, typer.Argument(help="Pictures: a folder, zip, tar, parquet files or shards.")],
    folder: Annotated[Path, typer.Argument(help="For the shards; the same command continues after a stop.")],
    size: Annotated[int, typer.Option(help="Side of the square pictures, in pixels.")],
    crop: Annotated[str, typer.Option(help="released, adm, stretch or none.")] = "released",
    format: Annotated[
        str | None, typer.Option(help="png, jpg or webp. [default: png up to 64 pixels, jpg above]")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of jpg and webp, 1 to 100.")] = 95,
    labels: Annotated[str, typer.Option(help="auto, folder, json, none, or a column or field of the labels.")] = "auto",
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Short for --labels none.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="Pictures a shard.")] = 4096,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: all cores]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first picture that cannot be used.")] = False,
    latents: Annotated[bool, typer.Option("--latents", help="Encode them; under torchrun on several GPUs.")] = False,
    vae: Annotated[str | None, typer.Option(help=f"With --latents: hub id or folder. [default: {DEFAULT_VAE}]")] = None,
    device: Annotated[str | None, typer.Option(help="With --latents. [default: a GPU if there is one]")] = None,
    mirror: Annotated[bool, typer.Option(help="With --latents: keep those of mirror images too.")] = True,
) -> None:
    """Write raw pictures, or with --latents their latents, as shards that training streams from."""
    from shortcutflow.data.latents import prepare_latents
    from shortcutflow.data.prepare import prepare, summary

    if latents and (format is not None or quality != 95):
        raise ValueError("--latents stores numbers: --format and --quality are for pictures")
    if not latents and (vae is not None or device is not None or not mirror):
        raise ValueError("--vae, --device and --no-mirror go with --latents")
    # Crop and format are words here; what they may be is checked where they are used.
    shared: dict[str, Any] = {
        "size": size, "crop": crop, "labels": "none" if no_labels else labels, "seed": seed,
        "samples_per_shard": samples_per_shard, "workers": workers, "strict": strict,
    }  # fmt: skip
    try:
        if latents:
            manifest = prepare_latents(source, folder, vae=vae or DEFAULT_VAE, device=device, mirror=mirror, **shared)
        else:
            pictures: dict[str, Any] = {"format": format, "quality": quality}
            manifest = prepare(source, folder, **pictures, **shared)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues in {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    if Rank.from_environment().number == 0:
        print(summary(manifest, folder))
