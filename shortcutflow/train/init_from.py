"""Trained networks that a run begins with: its initial weights, and the teacher it learns from."""

from __future__ import annotations

from torch import nn

from shortcutflow.config import RunConfig
from shortcutflow.models.model import Model, load


def load_start(config: RunConfig, network: nn.Module, teacher: Model | None) -> None:
    """Load a new network's first weights: those of ``config.start``, or of the teacher, or leave it as it is drawn.

    If ``start`` is a flow model, step sizes are made to change nothing until training makes them. The teacher's weights
    without a start are taken as they are, as the paper's two-phase methods do.

    Raises:
        ValueError: if the start is another network than the run's.
    """
    if config.start is None and teacher is None:
        return
    # Often they are one, and large.
    start = teacher if config.start in (None, config.teacher) else None
    start = start or open_trained(str(config.start), config, "start")
    knows_steps = not start.config.flow_only and config.objective.step_conditioned
    if knows_steps and start.finest_steps != config.finest_steps:
        raise ValueError(
            f"{start.folder} was trained with finest_steps={start.finest_steps} and knows the step sizes of that, this "
            f"run has finest_steps={config.finest_steps}: use the same, or begin with a flow model"
        )
    # Parameters of the objective's own begin anew.
    network.load_state_dict(network.state_dict() | start.network.state_dict())
    if config.start is not None and start.config.flow_only:
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


def open_trained(place: str, config: RunConfig, use: str) -> Model:
    """Load a model's folder, a run's (the newest, if it holds several), or a hub id; the network is in host memory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its network or samples differ from the run's.
    """
    model = load(place)
    both = [each.model_copy(update={"smoke_options": {}}) for each in (model.config.backbone, config.backbone)]
    if both[0] != both[1]:
        its, this = (f"{each.name!r} with options {each.options} that predicts {each.prediction}" for each in both)
        raise ValueError(
            f"training begins with the weights of its {use}, so both need the same backbone: {place} has {its}, this "
            f"run {this}"
        )
    info = config.data.describe()
    for name in ("shape", "num_classes", "condition_shape"):
        of_data, trained_on = getattr(info, name), getattr(model.config, name)
        if of_data != trained_on:
            raise ValueError(
                f"{place} cannot be the {use}: its {name} is {trained_on}, that of this run's data is {of_data}"
            )
    return model
