"""The command that measures the quality of samples by named protocols, and makes the statistics to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shortcutflow.commands.options import WHICH, Device, GuidanceScale, Weights
from shortcutflow.schedule import DEFAULT_STEPS

STEPS, METRICS, SAMPLES, BATCH_SIZE = DEFAULT_STEPS, ("fid",), 50_000, 250


def evaluate_command(
    model: Annotated[str | None, typer.Argument(help=WHICH)] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Numbers of steps. [default: 1 2 4 128]")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="fid, kid, is, precision, recall, density, coverage, label_accuracy; spaces or commas. [default: fid]"
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(help="clean-fid, released-code, adm, adm-spatial, dinov2, pixels, digits, or file:TORCHSCRIPT."),
    ] = "clean-fid",
    extractor_weights: Annotated[Path | None, typer.Option(help="The protocol's file of weights.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Statistics (.npz), images, or clean-fid:DATASET-SPLIT. [default: what the run was trained on]"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples for each number of steps.")] = SAMPLES,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = BATCH_SIZE,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the same for every number of steps.")] = 0,
    precision: Annotated[str, typer.Option(help="Of the network: float32 or bfloat16.")] = "float32",
    vae: Annotated[str | None, typer.Option(help="Autoencoder of latents. [default: the one they came from]")] = None,
    device: Device = None,
    save_images: Annotated[Path | None, typer.Option(help="Save the samples in this folder too, as PNG.")] = None,
    keep_features: Annotated[bool, typer.Option("--keep-features", help="For more metrics later.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The report, or with --make-stats the .npz. [default: in the run's folder]")
    ] = None,
    make_stats: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Make statistics of these images instead."),
    ] = None,
    with_features: Annotated[
        bool, typer.Option("--with-features", help="With --make-stats: for all metrics, not fid alone.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="With --make-stats: side to crop raw images to.")] = None,
    crop: Annotated[str, typer.Option(help="With --make-stats: released, adm or stretch.")] = "released",
) -> None:
    """Measure samples by a named protocol at several numbers of steps; or make statistics to compare with."""
    from shortcutflow.distributed import joined
    from shortcutflow.evaluation.evaluate import evaluate
    from shortcutflow.evaluation.features.protocols import check_protocol, open_protocol
    from shortcutflow.evaluation.metrics import check_request
    from shortcutflow.evaluation.report import report_path, table_of
    from shortcutflow.evaluation.samples import Sampler
    from shortcutflow.models.model import is_hub_id, load

    check_protocol(protocol)
    by: dict[str, Any] = {"name": protocol, "weights": extractor_weights}
    if make_stats is not None:
        if model is not None or reference is not None:
            raise ValueError("--make-stats reads images only: leave the model and --reference out")
        _make_stats(make_stats, by, out, device, batch_size, with_features, {"size": size, "crop": crop})
        return
    if model is None:
        raise ValueError("name a run's or a model's folder, or images with --make-stats SOURCE")
    if with_features or size is not None:
        raise ValueError("--with-features and --size go with --make-stats")
    if out is None and is_hub_id(model):
        raise ValueError(
            f"there is no folder {model}; for a model of that name on the hub, name the report with --out FILE.json"
        )
    names = tuple(name for words in metrics or METRICS for name in words.split(",") if name)
    request: dict[str, Any] = {"steps": tuple(steps or STEPS), "metrics": names, "samples": samples}
    check_request(**request)
    # What it may be is checked by the sampler.
    any_precision: Any = precision
    with joined(device or "auto") as world:
        opened = load(model, weights=weights, device=world.device)
        sampler = Sampler(
            opened, seed=seed, guidance_scale=guidance_scale, batch_size=batch_size, precision=any_precision, vae=vae
        )
        measure = open_protocol(**by, device=world.device)
        out = out or report_path(opened.folder, measure.name)
        report = evaluate(
            sampler, measure, out, reference=reference, images=save_images, keep_features=keep_features, world=world,
            **request,
        )  # fmt: skip
    if report is not None:
        print(f"{table_of(report)}\n{out}")


def _make_stats(
    source: str, by: dict[str, Any], out: Path | None, device: str | None, batch_size: int, with_features: bool,
    raw: dict[str, Any],
) -> None:  # fmt: skip
    from shortcutflow.distributed import joined
    from shortcutflow.evaluation.features.protocols import open_protocol
    from shortcutflow.evaluation.real_images import open_images
    from shortcutflow.evaluation.reference import make_reference

    if out is None or out.suffix != ".npz":
        raise ValueError(f"--make-stats needs --out FILE.npz, got {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    with joined(device or "auto") as world:
        images = open_images(source, **raw)
        protocol = open_protocol(**by, device=world.device)
        make_reference(images, protocol, out, with_features=with_features, world=world, batch_size=batch_size)
    if world.is_main:
        print(f"{out}: {images.count} images of {images.name}, protocol {protocol.name}")
