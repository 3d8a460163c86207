"""The command that turns raw images into shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shortcutflow.data.autoencoder import DEFAULT_VAE
from shortcutflow.distributed import Rank


def prepare_command(
    source: Annotated[str, typer.Argument(help="Images: a folder, zip, tar, parquet files or shards; URLs of these.")],
    folder: Annotated[Path, typer.Argument(help="For the shards; the same command continues after a stop.")],
    size: Annotated[int, typer.Option(help="Side of the square images, in pixels.")],
    crop: Annotated[str, typer.Option(help="released, adm, stretch or none.")] = "released",
    format: Annotated[
        str | None, typer.Option(help="png, jpg or webp. [default: png up to 64 pixels, jpg above]")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of jpg and webp, 1 to 100.")] = 95,
    labels: Annotated[str, typer.Option(help="auto, folder, json, none, or a column or field of the labels.")] = "auto",
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Short for --labels none.")] = False,
    encoding: Annotated[str | None, typer.Option(help="Of names in archives that are not UTF-8, such as gbk.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="Images a shard.")] = 4096,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: all cores]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    cache: Annotated[Path, typer.Option(help="For the files of URLs, which are kept there.")] = Path("data/cache"),
    latents: Annotated[bool, typer.Option("--latents", help="Encode them; under torchrun on several GPUs.")] = False,
    vae: Annotated[str | None, typer.Option(help=f"With --latents: hub id or folder. [default: {DEFAULT_VAE}]")] = None,
    device: Annotated[str | None, typer.Option(help="With --latents. [default: a GPU if there is one]")] = None,
    mirror: Annotated[bool, typer.Option(help="With --latents: keep those of mirror images too.")] = True,
) -> None:
    """Write images, or with --latents their latents, as shards that training streams from."""
    from shortcutflow.data.prepare import prepare, summary

    if latents and (format is not None or quality != 95):
        raise ValueError("--latents stores numbers: --format and --quality are for images")
    if not latents and (vae is not None or device is not None or not mirror):
        raise ValueError("--vae, --device and --no-mirror go with --latents")
    # Crop and format are strings here; what they may be is checked where they are used.
    options: dict[str, Any] = {
        "size": size, "crop": crop, "labels": "none" if no_labels else labels, "encoding": encoding, "seed": seed,
        "samples_per_shard": samples_per_shard,
    }  # fmt: skip
    if latents:
        options |= {"vae": vae or DEFAULT_VAE, "device": device, "mirror": mirror}
    else:
        options |= {"format": format, "quality": quality}
    try:
        manifest = prepare(source, folder, workers=workers, strict=strict, cache=cache, **options)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues in {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    if Rank.from_environment().number == 0:
        print(summary(manifest, folder))
