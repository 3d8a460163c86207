"""Trained networks that a run begins from: its first weights, and the teacher it learns from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from shortcutflow.config import CONFIG_FILE, RunConfig
from shortcutflow.evaluation.runs import find_run
from shortcutflow.interop.model import Model, load
from shortcutflow.interop.start import start_from_flow


def load_start(config: RunConfig, network: nn.Module, teacher: Model | None) -> None:
    """Give a new network its first weights: those of ``config.start``, or of the teacher, or leave it as it is drawn.

    A start that knows the flow alone is made ready for step sizes: they change nothing until training makes them.

    Raises:
        ValueError: if the start is another network than the run's.
    """
    if config.start is None:
        if teacher is not None:
            network.load_state_dict(teacher.network.state_dict())
        return
    # Often they are one, and large.
    start = teacher if config.start == config.teacher else None
    start = start or open_trained(config.start, config, "start")
    network.load_state_dict(start.network.state_dict())
    if start.config.flow_only:
        start_from_flow(network, config.finest_steps)


def open_teacher(config: RunConfig, device: torch.device) -> Model | None:
    """The model that the run learns from, frozen; None if it learns from none."""
    if config.teacher is None:
        return None
    teacher = open_trained(config.teacher, config, "teacher", device)
    teacher.network.requires_grad_(False)
    return teacher


def open_trained(path: Path, config: RunConfig, use: str, device: torch.device | str = "cpu") -> Model:
    """A model's folder, a run's (with the newest of several runs), or a hub id.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its network or samples differ from the run's.
    """
    holds_runs = path.is_dir() and not (path / CONFIG_FILE).is_file()
    model = load(find_run(path) if holds_runs else path, device=device)
    of_run, of_model = config.backbone, model.config.backbone
    if (of_run.name, of_run.options) != (of_model.name, of_model.options):
        raise ValueError(
            f"training begins with the weights of its {use}, so both need the same backbone: {path} has "
            f"{of_model.name!r} with options {of_model.options}, this run {of_run.name!r} with {of_run.options}"
        )
    info = config.data.describe()
    mine = {"shape": info.shape, "num_classes": info.num_classes, "condition_shape": info.condition_shape}
    for name, value in mine.items():
        if value != (theirs := getattr(model.config, name)):
            raise ValueError(f"{path} cannot be the {use}: its {name} is {theirs}, that of this run's data is {value}")
    return model
