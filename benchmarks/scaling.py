"""Step times on 1 ... 1,024 GPUs, predicted on paper from operations, bytes and stated speeds. Nothing is run.

    python benchmarks/scaling.py                              # where each combination stops scaling
    python benchmarks/scaling.py --measured dit_b_2=0.0005    # seconds a sample of a step on one GPU, or a file:
    python benchmarks/scaling.py --measured dit_b_2=benchmarks/results/train_step_dit_b_2_cuda.json
    python benchmarks/scaling.py --write                      # the JSON, docs/scaling.png and docs/training.md

A step takes: a fixed time, the arithmetic of the rank with the most bootstrap rows, the optimizer's pass over its
memory, and that part of the communication which is not hidden. Communication is the list of collectives that
``shortcutflow.train`` makes (a test counts them in a real run); a collective takes its bytes over its slowest link plus
its hops. Every speed is an assumption with an option: see Machine. "Strong" keeps the global batch, "weak" the batch of
each GPU. Efficiency is the images a second and GPU, against one GPU; below one half we say that scaling has stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import print_rows, put_into_readme, write_result
from benchmarks.scaling_model import (
    BOOTSTRAP,
    NETWORKS,
    PLANS,
    TARGET_CALLS,
    Machine,
    Model,
    Plan,
    described,
    predicted,
)

SIZES = tuple(2**i for i in range(11))
SHOWN = (8, 64, 256, 1024)
PLOT = Path(__file__).parent.parent / "docs" / "scaling.png"
START, END = "<!-- scaling table: benchmarks/scaling.py writes it -->", "<!-- end of scaling table -->"
FIXED = ("between", "gpus")
"""What of a Machine is no plain option."""
Row = dict[str, Any]


def rows_of(model: Model, plan: Plan, network: str, *, batch: int, strong: bool, machine: Machine) -> list[Row]:
    """Predictions for all sizes; those of strong scaling end where a GPU would be left without a sample."""
    rows = []
    alone = predicted(model, plan, 1, batch, machine).seconds
    for gpus in SIZES:
        global_batch = batch if strong else batch * gpus
        if global_batch < gpus:
            break
        step = predicted(model, plan, gpus, global_batch, machine)
        row = {
            "name": f"{model.name}, {plan}", "scaling": "strong" if strong else "weak", "network": network,
            "gpus": gpus, "global_batch": global_batch, "step_ms": 1000 * step.seconds,
            "compute_ms": 1000 * step.compute, "optimizer_ms": 1000 * step.optimizer,
            "communication_ms": 1000 * step.communication, "sent_gb": step.moved / 1e9,
            "images_per_second": global_batch / step.seconds,
            "efficiency": alone / step.seconds / (gpus if strong else 1),
        }  # fmt: skip
        rows.append(row)
    return rows


def stops_at(rows: Sequence[Row]) -> int | None:
    """The fewest GPUs at which efficiency is below one half; None if it never is."""
    return next((row["gpus"] for row in rows if row["efficiency"] < 0.5), None)


def networks_of(options: argparse.Namespace) -> dict[str, float]:
    """The networks to predict for."""
    return {"given": options.between} if options.between else NETWORKS


def all_rows(models: Iterable[Model], options: argparse.Namespace, machine: Machine) -> list[Row]:
    """Every model, plan and way of scaling on each network."""
    return [
        row
        for model in models
        for network, between in networks_of(options).items()
        for strong, batch in ((True, options.global_batch), (False, options.per_gpu))
        for plan in PLANS
        for row in rows_of(model, plan, network, batch=batch, strong=strong, machine=replace(machine, between=between))
    ]


def summary(rows: Iterable[Row]) -> list[Row]:
    """A line a curve: its efficiencies, and where it stops."""
    curves: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["name"], row["scaling"], row["network"]), []).append(row)
    lines = []
    for (name, scaling, network), curve in curves.items():
        at = {row["gpus"]: row["efficiency"] for row in curve}
        stops = stops_at(curve)
        line = {"name": f"{name}, {scaling}, {network}", "stops": "no" if stops is None else f"at {stops:,}"}
        lines.append(line | {f"at_{gpus}": at.get(gpus) for gpus in SHOWN})
    return lines


def table_of(rows: list[Row]) -> str:
    """The summary as Markdown."""
    lines = ["| | 8 GPUs | 64 | 256 | 1,024 | below half |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for line in summary(rows):
        cells = ["" if line[f"at_{n}"] is None else f"{line[f'at_{n}']:.0%}" for n in SHOWN]
        lines.append(f"| {line['name']} | {' | '.join(cells)} | {line['stops']} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Efficiency against GPUs: a panel a model and way of scaling, a line a plan, dashed on the slower network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["name"].split(", ")[0] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, panels = pyplot.subplots(
        2, len(models), figsize=(5 * len(models), 7), sharex=True, sharey=True, squeeze=False
    )
    for (i, scaling), (j, model) in ((a, b) for a in enumerate(("strong", "weak")) for b in enumerate(models)):
        panel = panels[i][j]
        for network, style in zip(networks, ("-", "--"), strict=False):
            for plan, colour in zip(PLANS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
                wanted = (f"{model}, {plan}", scaling, network)
                curve = [row for row in rows if (row["name"], row["scaling"], row["network"]) == wanted]
                x, y = [row["gpus"] for row in curve], [row["efficiency"] for row in curve]
                panel.plot(x, y, style, color=colour, label=f"{plan}, {network}")
        panel.axhline(0.5, color="grey", linewidth=0.8)
        panel.set(title=f"{model}, {scaling} scaling", xscale="log", ylim=(0, 1.2))
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES, [f"{n:,}" for n in SIZES], fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("GPUs")
    for line in panels:
        line[0].set_ylabel("efficiency (predicted)")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def measured(text: str) -> tuple[str, float]:
    """NAME=SECONDS of a training step a sample, or NAME=FILE, a result of benchmarks/train_step.py.

    Raises:
        ValueError: for another form, or a file without the shortcut objective's row.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--measured takes NAME=SECONDS or NAME=FILE, got {text!r}")
    if not value.endswith(".json"):
        return name, float(value)
    rows = {row["name"]: row for row in json.loads(Path(value).read_text())["rows"]}
    wanted = "shortcut, k = 1/4"
    if wanted not in rows:
        raise ValueError(f"{value} has no row {wanted!r}; it has: {', '.join(rows)}")
    return name, 1 / rows[wanted]["images_per_second"]


def main() -> None:
    """Predict, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["dit_b_2", "dit_xl_2"])
    parser.add_argument("--global-batch", type=int, default=256, help="strong scaling: samples a step")
    parser.add_argument("--per-gpu", type=int, default=32, help="weak scaling: samples a step and GPU")
    parser.add_argument("--between", type=float, help="bytes a second between machines, in place of two networks")
    for field in fields(Machine):
        if field.name not in FIXED:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    parser.add_argument("--measured", type=measured, action="append", default=[], help="see above")
    parser.add_argument("--plot", type=Path, help="write the plot there")
    parser.add_argument("--write", action="store_true", help="write the JSON, docs/scaling.png and docs/training.md")
    options = parser.parse_args()
    speeds = {f.name: getattr(options, f.name) for f in fields(Machine) if f.name not in FIXED}
    machine, known = Machine(**speeds), dict(options.measured)
    models = [described(name) for name in options.backbones]
    per_sample = 3 + TARGET_CALLS * BOOTSTRAP
    models = [m._replace(seconds=known[m.name] / per_sample) if m.name in known else m for m in models]
    rows = all_rows(models, options, machine)
    for line in summary(rows):
        print_rows([line])
        print(f"    below half: {line['stops']}")
    if options.plot or options.write:
        plot(rows, options.plot or PLOT)
    if options.write:
        config = asdict(machine) | {"networks": networks_of(options), "models": [m._asdict() for m in models]}
        print(write_result("scaling", torch.device("cpu"), config, rows))
        put_into_readme(START, table_of(rows), END, page="docs/training.md")


if __name__ == "__main__":
    main()
