"""Trained networks that a run begins from: its first weights, and the teacher it learns from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from shortcutflow.config import CONFIG_FILE, RunConfig
from shortcutflow.models.model import Model, load
from shortcutflow.run_dir import find_run


def load_start(config: RunConfig, network: nn.Module, teacher: Model | None) -> None:
    """Give a new network its first weights: those of ``config.start``, or of the teacher, or leave it as it is drawn.

    A start that knows the flow alone is made ready for step sizes: they change nothing until training makes them. The
    teacher's weights without a start are taken as they are, as the paper's two-phase methods do.

    Raises:
        ValueError: if the start is another network than the run's.
    """
    if config.start is None and teacher is None:
        return
    # Often they are one, and large.
    start = teacher if config.start in (None, config.teacher) else None
    start = start or open_trained(str(config.start), config, "start")
    made_ready = config.start is not None and start.config.flow_only
    knows_steps = not start.config.flow_only and config.objective.step_conditioned
    if knows_steps and start.finest_steps != config.finest_steps:
        raise ValueError(
            f"{start.folder} was trained with finest_steps={start.finest_steps} and knows the step sizes of that, this "
            f"run has finest_steps={config.finest_steps}: use the same, or begin with a flow model"
        )
    # Parameters of the objective's own begin anew.
    network.load_state_dict(network.state_dict() | start.network.state_dict())
    if made_ready:
        start_from_flow(network, start.finest_steps)


def start_from_flow(network: nn.Module, finest_steps: int) -> None:
    """Make a network that was trained as a flow return, at every step size, what it returned at d = 1/M.

    Args:
        network: changed in place, before it is sharded.
        finest_steps: M of the flow's training.

    Raises:
        ValueError: for a network that cannot do this, or M that is no power of two.
    """
    zero = getattr(network, "zero_step_embedding", None)
    if zero is None:
        raise ValueError(
            f"a {type(network).__name__} cannot start from a flow: it has no method zero_step_embedding(finest_steps), "
            "as this project's backbones and networks of backbones.adapt() have"
        )
    zero(finest_steps)


def open_teacher(config: RunConfig) -> Model | None:
    """The model that the run learns from, frozen, in host memory; None if it learns from none."""
    if config.teacher is None:
        return None
    teacher = open_trained(config.teacher, config, "teacher")
    teacher.network.requires_grad_(False)
    return teacher


def new_teacher(config: RunConfig, finest_steps: int | None) -> nn.Module | None:
    """A frozen network for the teacher's weights in a checkpoint; None if the run learns from none."""
    if config.teacher is None:
        return None
    return config.build_network(finest_steps=finest_steps, wrapped=False).eval().requires_grad_(False)


def open_trained(place: str, config: RunConfig, use: str) -> Model:
    """A model's folder, a run's (with the newest of several runs), or a hub id; the network is in host memory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its network or samples differ from the run's.
    """
    path = Path(place)
    holds_runs = path.is_dir() and not (path / CONFIG_FILE).is_file()
    model = load(find_run(path) if holds_runs else place)
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
