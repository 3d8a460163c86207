"""The commands that draw: ``shortcutflow plot KIND RUN... --out FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortcutflow.commands.subjects import check_out, open_subject
from shortcutflow.data.source import DataSettings, ShardsData

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from shortcutflow.evaluation.decoded import ImageDecoder
    from shortcutflow.evaluation.drawing.predictor import Predictor
    from shortcutflow.evaluation.subject import Subject
    from shortcutflow.types import Batch

Source = Annotated[str, typer.Argument(help="A run's or model's folder, a folder of runs (the newest), or a hub id.")]
Labels = Annotated[list[int] | None, typer.Option(help="A label a sample. [default: all in turn]")]
Seed = Annotated[int, typer.Option(help="Of the noise: the samples are those of shortcutflow sample.")]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")]
Weights = Annotated[
    str | None, typer.Option(help="An EMA's name, 'current', or a .safetensors file. [default: the run's]")
]
Data = Annotated[Path | None, typer.Option(help="Folder of prepared shards. [default: what the run was trained on]")]
Device = Annotated[str | None, typer.Option(help="[default: a GPU if there is one]")]
Out = Annotated[Path | None, typer.Option(help="The picture to write (PNG). [default: KIND.png]")]

plot_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Draw a run: what its samples are like, and why."
)


@plot_app.command("quality")
def quality_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs that were evaluated, or their reports (JSON).")],
    out: Annotated[Path, typer.Option(help="The picture to write (PNG, SVG or PDF).")] = Path("quality.png"),
    metric: Annotated[str | None, typer.Option(help="For example fid. [default: the usual one]")] = None,
    protocol: Annotated[str | None, typer.Option(help="Draws evaluation-PROTOCOL.json, of several reports.")] = None,
) -> None:
    """Quality against the number of steps, a curve a run."""
    from shortcutflow.evaluation.drawing.curves import SUFFIXES, draw_quality, save_figure
    from shortcutflow.evaluation.drawing.quality import find_report, read_report

    check_out(out, SUFFIXES)
    reports = [read_report(find_report(run, protocol=protocol)) for run in runs]
    save_figure(draw_quality(reports, metric=metric), out)
    print(f"{out}: {', '.join(str(report.file) for report in reports)}")


@plot_app.command("trajectory")
def trajectory_command(
    run: Source,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 8,
    columns: Annotated[int, typer.Option(help="At most so many of its states.")] = 9,
    labels: Labels = None,
    count: Annotated[int | None, typer.Option(help="Samples, where no labels are given. [default: 4]")] = None,
    out: Out = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """The states a sampler goes through, and where the network says that each will end."""
    from shortcutflow.evaluation.drawing.starts import starts_of
    from shortcutflow.evaluation.drawing.trajectories import trajectory_picture

    out = _checked(out, "trajectory")
    subject, predictor = _opened(run, weights, guidance_scale, device)
    noise, y = starts_of(subject.info, labels=labels, count=_or(count, labels, 4), seed=seed, device=subject.device)
    picture = trajectory_picture(predictor, noise, y, _decoder(subject), steps=steps, columns=columns, seed=seed)
    _write(picture, out, subject)


@plot_app.command("interpolation")
def interpolation_command(
    run: Source,
    steps: Annotated[list[int] | None, typer.Option(help="Sampling budgets, a row each. [default: 1]")] = None,
    pairs: Annotated[int | None, typer.Option(help="Of noises, where no labels are given. [default: 4]")] = None,
    columns: Annotated[int, typer.Option(help="Samples from one noise to the other, with both.")] = 9,
    labels: Annotated[list[int] | None, typer.Option(help="A label a pair. [default: all in turn]")] = None,
    out: Out = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Samples on the way from one noise to another."""
    from shortcutflow.evaluation.drawing.interpolation import interpolate_samples, interpolation_picture
    from shortcutflow.evaluation.drawing.starts import pairs_of

    out = _checked(out, "interpolation")
    subject, predictor = _opened(run, weights, guidance_scale, device)
    budgets = steps or [1]
    noise, y = pairs_of(subject.info, labels=labels, pairs=_or(pairs, labels, 4), seed=seed, device=subject.device)
    made = [interpolate_samples(predictor, noise, y, columns=columns, steps=steps, seed=seed) for steps in budgets]
    images = dict(zip(budgets, _decoder(subject)(*made), strict=True))
    _write(interpolation_picture(images, y), out, subject)


@plot_app.command("neighbours")
def neighbours_command(
    run: Source,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 1,
    nearest: Annotated[int, typer.Option(help="Neighbours a sample.")] = 5,
    labels: Labels = None,
    count: Annotated[int | None, typer.Option(help="Samples, where no labels are given. [default: 8]")] = None,
    out: Out = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """The training samples that are nearest to generated ones: were they learnt by heart?"""
    from shortcutflow.evaluation.drawing.neighbours import neighbours_in, neighbours_picture, said
    from shortcutflow.evaluation.drawing.starts import starts_of
    from shortcutflow.evaluation.generate import fresh_noise_of

    out = _checked(out, "neighbours")
    subject, predictor = _opened(run, weights, guidance_scale, device)
    source = _data(subject, data)
    noise, y = starts_of(subject.info, labels=labels, count=_or(count, labels, 8), seed=seed, device=subject.device)
    fresh = fresh_noise_of(seed, range(len(noise)), noise)
    samples = predictor.sample(noise, y, steps=steps, fresh_noise=fresh)
    found, real_distance = neighbours_in(source, samples, nearest)
    _write(neighbours_picture(samples, found, real_distance, y, _decoder(subject)), out, subject)
    print(said(found, real_distance))


@plot_app.command("reconstruction")
def reconstruction_command(
    run: Source,
    count: Annotated[int, typer.Option(help="Real samples.")] = 4,
    out: Out = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = 1.0,
    weights: Weights = None,
    device: Device = None,
    data: Data = None,
) -> None:
    """Real data with noise on it, sent back by one step of each size that the network knows."""
    from shortcutflow.evaluation.drawing.real import some_data
    from shortcutflow.evaluation.drawing.reconstruction import reconstruct, reconstruction_picture
    from shortcutflow.evaluation.drawing.starts import starts_of

    out = _checked(out, "reconstruction")
    subject, predictor = _opened(run, weights, guidance_scale, device)
    source = _data(subject, data)
    noise, _ = starts_of(subject.info, count=count, seed=seed, device=subject.device)
    batch = some_data(source, count, seed=seed)
    y = _labels_in(batch, subject)
    ends = reconstruct(predictor, batch.data.to(subject.device), noise, y)
    _write(reconstruction_picture(ends.decoded(_decoder(subject)), y), out, subject)


def _opened(place: str, weights: str | None, guidance_scale: float, device: str | None) -> tuple[Subject, Predictor]:
    """A run or a model, and how it is asked."""
    from shortcutflow.distributed import Rank
    from shortcutflow.evaluation.drawing.predictor import Predictor

    subject = open_subject(place, weights, Rank().device(device))
    return subject, Predictor(subject.network, guidance_scale=guidance_scale, **subject.sampler_options())


def _decoder(subject: Subject) -> ImageDecoder:
    from shortcutflow.evaluation.decoded import ImageDecoder

    return ImageDecoder(subject.info, subject.device)


def _data(subject: Subject, folder: Path | None) -> DataSettings:
    """The real data, which must fit the network."""
    if folder is not None:
        source = ShardsData(folder=folder)
        found = source.describe()
        if found.shape != subject.info.shape:
            raise ValueError(
                f"--data {folder} holds samples of shape {found.shape}, {subject.name} makes {subject.info.shape}"
            )
        return source
    if subject.data is None:
        raise ValueError(
            f"{subject.name} is a model, which does not say what it was trained on: give --data FOLDER, its shards"
        )
    return subject.data


def _labels_in(batch: Batch, subject: Subject) -> Tensor | None:
    """The labels of real data, which the network must know."""
    from shortcutflow.evaluation.drawing.starts import check_labels

    if subject.info.num_classes is None:
        return None
    if batch.y is None:
        raise ValueError(f"{subject.name} was trained with labels and the data has none: give --data with labels")
    check_labels(batch.y.tolist(), subject.info.num_classes)
    return batch.y.to(subject.device)


def _checked(out: Path | None, kind: str) -> Path:
    out = Path(f"{kind}.png") if out is None else out
    check_out(out, (".png",))
    return out


def _or(count: int | None, labels: list[int] | None, default: int) -> int | None:
    """The count asked for; the default where labels do not say how many."""
    return default if count is None and labels is None else count


def _write(picture: np.ndarray, out: Path, subject: Subject) -> None:
    from shortcutflow.evaluation.drawing.grids import save_picture

    save_picture(picture, out)
    step = "" if subject.step is None else f" at step {subject.step}"
    print(f"{out}: {subject.folder or subject.name}{step}, weights {subject.weights}")
