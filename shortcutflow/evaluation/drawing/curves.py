"""Quality against the number of sampling steps, a curve a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shortcutflow.evaluation.drawing.quality import Report, check_comparable, metric_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
TITLES = {
    "fid": "FID", "frechet": "Fréchet distance", "frechet_distance": "Fréchet distance", "kid": "KID",
    "is": "Inception score", "inception_score": "Inception score", "score": "mean coverage of the goal / 0.95",
    "solved": "share solved", "read_correctly": "share read as the label asked for",
}  # fmt: skip
LOWER_IS_BETTER = ("fid", "frechet", "frechet_distance", "kid")
HIGHER_IS_BETTER = (
    "is", "inception_score", "score", "solved", "read_correctly", "precision", "recall", "density", "coverage",
)  # fmt: skip
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind people too (Okabe and Ito)."""
MARKERS = "osD^vP*"
WIDE_RANGE = 8
"""A distance whose largest value is so many times its smallest is drawn on a logarithmic axis."""


def draw_quality(reports: Sequence[Report], *, metric: str | None = None) -> Figure:
    """Draw a metric of several runs against the number of steps, on an axis of powers of two.

    Args:
        reports: one a curve, all of the same protocol.
        metric: which; None takes the first usual one that all have.

    Raises:
        ValueError: for no reports, different protocols, or a metric that a report does not have.
        ImportError: without matplotlib.
    """
    if not reports:
        raise ValueError("nothing to draw: give at least one run")
    check_comparable(reports)
    metric = metric_of(reports, metric)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
    except ImportError as error:
        raise ImportError("curves are drawn by matplotlib: pip install 'shortcutflow[plot]'") from error
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (report, name) in enumerate(zip(reports, _names(reports), strict=True)):
        steps, values = zip(*sorted(report.values[metric].items()), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(steps, values, style, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    budgets = sorted({steps for report in reports for steps in report.values[metric]})
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    numbers = [value for report in reports for value in report.values[metric].values()]
    if metric in LOWER_IS_BETTER and min(numbers) > 0 and max(numbers) > WIDE_RANGE * min(numbers):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(numbers) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(_title(metric))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1, edgecolor="white", fontsize=9)
    # The words of others may hold dollars, which matplotlib would read as mathematics.
    axes.set_title(_shortened(_measured(reports[0])), fontsize=8, color="#555555", parse_math=False, wrap=True)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as what the file's suffix says: .png, .svg or .pdf."""
    figure.savefig(path, metadata={"Creator": "shortcutflow"})


def _title(metric: str) -> str:
    title = TITLES.get(metric, metric.replace("_", " "))
    if metric in LOWER_IS_BETTER:
        return f"{title} (lower is better)"
    return f"{title} (higher is better)" if metric in HIGHER_IS_BETTER else title


def _measured(report: Report) -> str:
    samples = report.details.get("samples")
    return report.protocol if samples is None else f"{report.protocol}, {samples} samples"


def _names(reports: Sequence[Report]) -> list[str]:
    """What runs are called: their folders' names, with as much of the path before and after as tells them apart."""
    files = [report.file.absolute() for report in reports]
    for naming in (_folder, _folder_and_file):
        names = [naming(file) for file in files]
        if len(set(names)) == len(names):
            return names
    return [str(file.parent / file.stem) for file in files]


def _folder(file: Path) -> str:
    return file.parent.name


def _folder_and_file(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def _shortened(text: str, longest: int = 160) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
