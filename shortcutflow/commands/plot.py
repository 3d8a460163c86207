"""The commands that draw: ``shortcutflow plot KIND RUN... --out FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shortcutflow.commands.options import Device, GuidanceScale, Labels, Place, Weights
from shortcutflow.data.source import DataSource, ShardsData
from shortcutflow.io.atomic import require_place

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from shortcutflow.models.model import Model

Seed = Annotated[int, typer.Option(help="Of the noise: the samples are those of shortcutflow sample.")]
Data = Annotated[Path | None, typer.Option(help="Folder of prepared shards. [default: what the run was trained on]")]
Out = Annotated[Path, typer.Option(help="The image to write (PNG).")]

plot_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Draw a run: what its samples are like, and why."
)


@plot_app.command("quality")
def quality_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs that were evaluated, or their reports (JSON).")],
    out: Annotated[Path, typer.Option(help="The figure to write (PNG, SVG or PDF).")] = Path("quality.png"),
    metric: Annotated[str | None, typer.Option(help="For example fid. [default: the usual one]")] = None,
    protocol: Annotated[str | None, typer.Option(help="Draws evaluation-PROTOCOL.json, of several reports.")] = None,
) -> None:
    """Quality against the number of steps, a curve a run."""
    from shortcutflow.evaluation.quality import FIGURE_SUFFIXES, draw_quality, find_report

    require_place(out, *FIGURE_SUFFIXES)
    files = [find_report(run, protocol=protocol) for run in runs]
    draw_quality(files, metric=metric).savefig(out, metadata={"Creator": "shortcutflow"})
    print(f"{out}: {', '.join(map(str, files))}")


@plot_app.command("trajectory")
def trajectory_command(
    run: Place,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 8,
    columns: Annotated[int, typer.Option(help="At most so many of its states.")] = 9,
    labels: Labels = None,
    count: Annotated[int | None, typer.Option(help="Samples, where no labels are given. [default: 4]")] = None,
    out: Out = Path("trajectory.png"),
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """The states a sampler goes through, and what the network predicts for x_1 from each."""
    from shortcutflow.evaluation import plots
    from shortcutflow.evaluation.generate import initial_noise
    from shortcutflow.evaluation.sample_grid import n_steps

    model = _opened(out, run, weights, device)
    noise, y = initial_noise(model, labels=labels, count=count, default=4, seed=seed)
    t, rows = plots.trajectory_rows(
        model, noise, y, steps=steps, columns=columns, guidance_scale=guidance_scale, seed=seed
    )
    title = f"{n_steps(steps)}. {plots.TRAJECTORY_TITLE}"
    _write(plots.x1_image(t, _decoded(model, rows), y, title=title), out, model)


@plot_app.command("interpolation")
def interpolation_command(
    run: Place,
    steps: Annotated[list[int] | None, typer.Option(help="Numbers of steps, a row each. [default: 1]")] = None,
    pairs: Annotated[int | None, typer.Option(help="Of noises, where no labels are given. [default: 4]")] = None,
    columns: Annotated[int, typer.Option(help="Samples from one noise to the other, with both.")] = 9,
    labels: Annotated[list[int] | None, typer.Option(help="A label a pair. [default: all in turn]")] = None,
    out: Out = Path("interpolation.png"),
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Samples on the way from one noise to another."""
    from shortcutflow.evaluation import plots
    from shortcutflow.evaluation.generate import initial_noise

    model = _opened(out, run, weights, device)
    noise, y = initial_noise(model, labels=labels, count=pairs, default=4, noises_per_label=2, seed=seed)
    samples = {
        number: plots.interpolated_samples(
            model, noise, y, columns=columns, steps=number, guidance_scale=guidance_scale, seed=seed
        )
        for number in steps or [1]
    }
    _write(plots.interpolation_image(_decoded(model, samples), y), out, model)


@plot_app.command("neighbours")
def neighbours_command(
    run: Place,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 1,
    nearest: Annotated[int, typer.Option(help="Neighbours a sample.")] = 5,
    labels: Labels = None,
    count: Annotated[int | None, typer.Option(help="Samples, where no labels are given. [default: 8]")] = None,
    out: Out = Path("neighbours.png"),
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """The training samples that are nearest to generated ones: were they memorised?"""
    import torch

    from shortcutflow.evaluation import plots
    from shortcutflow.evaluation.generate import generate, initial_noise

    model = _opened(out, run, weights, device)
    source = _data(model, data)
    noise, y = initial_noise(model, labels=labels, count=count, default=8, seed=seed)
    samples = generate(model, noise, y, steps=steps, guidance_scale=guidance_scale, seed=seed).float().cpu()
    distance, found, among_data = plots.neighbours_in_data(source, samples, nearest)
    title = (
        f"Mean distance to the nearest training sample: generated samples {distance[:, 0].mean():.3f}, other "
        f"training samples {among_data:.3f}."
    )
    images = _decoded(model, {0: torch.cat([samples[:, None], found], dim=1)})[0]
    _write(plots.neighbours_image(images, distance, y, title=title), out, model)
    print(title)


@plot_app.command("reconstruction")
def reconstruction_command(
    run: Place,
    count: Annotated[int, typer.Option(help="Real samples.")] = 4,
    out: Out = Path("reconstruction.png"),
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """Real data with noise added, sent back by one step of each size that the network knows."""
    from shortcutflow.evaluation import plots
    from shortcutflow.evaluation.generate import check_labels, initial_noise

    model = _opened(out, run, weights, device)
    noise, y = initial_noise(model, count=count, seed=seed)
    real = _data(model, data).first(count, seed=seed)
    if y is not None:
        if real.y is None:
            raise ValueError(f"{model.name} was trained with labels and the data has none: give --data with labels")
        check_labels(real.y.tolist(), model.info.num_classes)
        y = real.y.to(model.device)
    t, rows = plots.reconstruction_rows(model, real.data.to(model.device), noise, y, guidance_scale=guidance_scale)
    image = plots.x1_image(t, _decoded(model, rows), y, title=plots.RECONSTRUCTION_TITLE, with_step_size=True)
    _write(image, out, model)


def _opened(out: Path, place: str, weights: str | None, device: str | None) -> Model:
    """The model to draw, after a look at the file to write."""
    from shortcutflow.distributed import Rank
    from shortcutflow.models.model import load

    require_place(out, ".png")
    return load(place, weights=weights, device=Rank().device(device))


def _write(image: np.ndarray, out: Path, model: Model) -> None:
    from shortcutflow.evaluation.sample_grid import save_image

    save_image(image, out)
    print(f"{out}: {model}")


def _decoded(model: Model, samples: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Samples as images, by the same keys."""
    from shortcutflow.evaluation.decode import ImageDecoder

    return dict(zip(samples, ImageDecoder(model.info, model.device)(*samples.values()), strict=True))


def _data(model: Model, folder: Path | None) -> DataSource:
    """The real data, which must fit the network."""
    if folder is not None:
        source = ShardsData(folder=folder)
        if (shape := source.describe().shape) != model.info.shape:
            raise ValueError(f"--data {folder} holds samples of shape {shape}, {model.name} makes {model.info.shape}")
        return source
    if model.data is None:
        raise ValueError(
            f"{model.name} is a model, which does not say what it was trained on: give --data FOLDER, its shards"
        )
    return model.data
