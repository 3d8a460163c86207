"""The released code's baselines, from its recorded draws: targets, whole training steps, samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shortcutflow import sample
from shortcutflow.objectives import (
    ConsistencyDistillationObjective,
    ConsistencyTrainingObjective,
    Context,
    Draw,
    LiveReflowObjective,
    Objective,
    ProgressiveDistillationObjective,
)
from shortcutflow.objectives.released import live_reflow_rows
from shortcutflow.types import SamplerKind, Targets
from tests.conftest import GOLDEN
from tests.parity.recorded import Recording, build
from tests.parity.test_steps import grads_of

KINDS = ("consistency", "consistency_distillation", "progressive", "livereflow")
V_TOLERANCE = {"livereflow": 2e-5}
TYPES = {"consistency-distillation": "consistency_distillation"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    if "case" in metafunc.fixturenames:
        found = []
        for file in sorted(folder.glob("targets_*.npz")):
            z = opened(file)
            found += [(file, c) for c in z.cases() if kind_of(z.below(c).json("config")) in KINDS]
        metafunc.parametrize("case", found, ids=lambda fc: f"{fc[0].stem}-{fc[1]}")
    if "variant" in metafunc.fixturenames:
        found = []
        for file in sorted(folder.glob("train_step_variants*.npz")):
            names = {n.split("/")[0] for n in opened(file).arrays}
            found += [(file, n) for n in sorted(names) if n in KINDS]
        metafunc.parametrize("variant", found, ids=lambda v: f"{v[0].stem}-{v[1]}")
    if "run" in metafunc.fixturenames:
        runs = []
        for file in sorted(folder.glob("sampling*.npz")):
            names = {"/".join(n.split("/")[:2]) for n in opened(file).arrays if n.endswith("/x")}
            runs += [(file, n) for n in sorted(names) if n.split("/")[0] in ("consistency", "livereflow")]
        metafunc.parametrize("run", runs, ids=lambda r: f"{r[0].stem}-{r[1]}")


@cache
def opened(file: Path) -> Recording:
    return Recording.open(file)


def kind_of(config: dict[str, Any]) -> str:
    return TYPES.get(config["train_type"], config["train_type"])


def objective_of(config: dict[str, Any]) -> Objective:
    """The objective under the released code's own switches."""
    T = config["denoise_timesteps"]
    match kind_of(config):
        case "consistency":
            return ConsistencyTrainingObjective.released(T)
        case "consistency_distillation":
            return ConsistencyDistillationObjective.released(T)
        case "progressive":
            return ProgressiveDistillationObjective.released(
                denoise_timesteps=T, bootstrap_cfg=bool(config["bootstrap_cfg"]), cfg_scale=config["cfg_scale"]
            )
        case "livereflow":
            return LiveReflowObjective.released(
                denoise_timesteps=T, bootstrap_every=config["bootstrap_every"], cfg_scale=config["cfg_scale"],
                class_dropout_prob=config["class_dropout_prob"],
            )  # fmt: skip
    raise AssertionError(config["train_type"])


def draw_of(objective: Any, config: dict[str, Any], draw: Recording, step: int) -> Draw:
    """The recorded integers and noises as this library's draw; the step size is the objective's own."""
    T, progress = config["denoise_timesteps"], step / config["max_steps"]

    def times(name: str, size: float) -> Tensor:
        t = draw.tensor(name).float() * size
        return t if config.get("force_t", -1) == -1 else torch.full_like(t, config["force_t"])

    if kind_of(config) == "livereflow":
        reflow, flow = times("t_int_reflow", 1 / T), times("t_int_flow", 1 / T)
        return live_reflow_rows(reflow, flow, draw.images("x0_flow"), draw.tensor("label_drop"), T)
    match kind_of(config):
        case "consistency":
            size = objective.gap_at(progress)
        case "progressive":
            # The released schedule runs over its end at its last step.
            size = 2.0 if step == config["max_steps"] else objective.size_at(progress)
        case _:
            size = 1 / T
    noise, t = draw.images("x0"), times("t_int", size)
    first_stage = len(noise) if size == 2 / T else 0
    return Draw(noise, t, torch.full_like(t, size), torch.zeros(len(noise), dtype=torch.bool), max_guided=first_stage)


def on(device: torch.device, draw: Any) -> Any:
    return type(draw)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(draw).items()})


def nets_of(z: Recording, config: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    """The network that makes targets, and the teacher or None."""
    kind, average = kind_of(config), bool(config["bootstrap_ema"])
    own = "params_ema" if kind.startswith("consistency") else "params"
    teachers = {"consistency_distillation": "teacher_params_ema"}
    teacher = teachers.get(kind, "teacher_params_ema" if average else "teacher_params")
    sizes, ignore = z.json("config"), kind != "livereflow"
    net = build(sizes, z.params(own), ignore_step_size=ignore).to(device)
    if not objective_of(config).needs_teacher:
        return net, None
    return net, build(sizes, z.params(teacher), ignore_step_size=ignore).to(device)


def targets_of(
    file: Path, case: str, device: torch.device, change: Callable[[Any, Any], tuple[Any, Any]] | None = None
) -> tuple[Targets, Any, Recording]:
    """The case's targets, its draw and its recording; ``change`` may alter objective and draw."""
    z = opened(file)
    c = z.below(case)
    config = c.json("config")
    objective: Any = objective_of(config)
    draw: Any = draw_of(objective, config, c.below("draw"), config["step"])
    if change is not None:
        objective, draw = change(objective, draw)
    net, teacher = nets_of(z, config, device)
    labels = (c if "labels" in c else z).tensor("labels").long()
    targets = objective.targets(
        net, z.images("images").to(device), labels.to(device), on(device, draw),
        Context(teacher=teacher, null_y=config["num_classes"]),
    )  # fmt: skip
    return targets, draw, c


def test_targets(case: tuple[Path, str], device: torch.device) -> None:
    targets, draw, c = targets_of(*case, device)
    out, kind = c.below("out"), kind_of(c.json("config"))
    sizes = targets.d.cpu() if kind == "livereflow" else draw.d
    assert torch.equal(targets.t.cpu(), out.tensor("t"))
    assert torch.equal(sizes, torch.exp2(-out.tensor("dt_base")).expand_as(sizes))
    assert targets.y is not None
    assert torch.equal(targets.y.cpu(), out.tensor("labels").long())
    assert (targets.x_t.cpu() - out.images("x_t")).abs().max() <= 4e-6
    error = (targets.v.cpu() - out.images("v_t")).abs()
    assert error.max() <= V_TOLERANCE.get(kind, 5e-5)
    assert error[targets.n_bootstrap :].numel() == 0 or error[targets.n_bootstrap :].max() <= 2e-6
    for name, mean in targets.metrics.items():
        if f"info/{name}" in out:
            # Of consistency training the released code logs the way to the neighbour, not its velocity.
            unit = float(draw.d[0]) if (kind, name) == ("consistency", "v_magnitude_b1") else 1
            assert unit * float(mean.value) == pytest.approx(float(out.array(f"info/{name}")), abs=1e-5), name
    assert (kind == "livereflow") != {"v_magnitude_b1", "v_magnitude_b2", "v_magnitude_bootstrap"}.issubset(
        targets.metrics
    )


def test_training_step(variant: tuple[Path, str]) -> None:
    """Loss and gradients of a step; what AdamW does with them is shown in test_steps.py."""
    file, name = variant
    z = opened(file)
    step = z.below(name)
    flags = step.json("flags")
    order = step.tensor("draw/id_perm").long()
    images, labels = step.images("images")[order], step.tensor("labels").long()[order]
    objective: Any = objective_of(flags)
    draw = draw_of(objective, flags, step.below("draw"), int(step.array("step_before")) + 1)
    makes_targets, teacher = nets_of(z, flags, torch.device("cpu"))
    net = build(z.json("config"), z.params(), ignore_step_size=name != "livereflow")
    targets = objective.targets(
        makes_targets, images, labels, draw, Context(teacher=teacher, null_y=flags["num_classes"])
    )
    assert (targets.v - step.images("targets/v_t")).abs().max() <= V_TOLERANCE.get(name, 5e-5)
    report = objective.regress(net, targets)
    report.loss.backward()
    for key in ("loss", "loss_flow", "loss_bootstrap"):
        if f"info/{key}" in step:
            assert float(report.metrics[key]) == pytest.approx(float(step.array(f"info/{key}")), abs=1e-5), key
    recorded = step.params("grads")
    assert recorded
    for key, grad in grads_of(net).items():
        assert abs(grad - recorded[key]).max() <= 2e-6 * (1 + abs(recorded[key]).max()), key


def samples_of(file: Path, name: str, device: torch.device, sampler: SamplerKind, **changed: Any) -> tuple[Tensor, Any]:
    z = opened(file)
    kind, budget = name.split("/")
    steps, scale = (float(part.lstrip("stepcfg")) for part in budget.split("_"))
    config = z.json("config")
    own = z.below(kind) if f"{kind}/x0" in z else z
    options: dict[str, Any] = {"steps": int(steps), "guidance_scale": scale, "null_y": config["num_classes"]}
    if kind == "consistency":
        eps = z.tensor("consistency/eps").permute(0, 1, 4, 2, 3)
        options["fresh_noise"] = lambda i: eps[i].to(device)
    net = build(config, z.params(), ignore_step_size=kind == "consistency").to(device)
    noise, labels = own.images("x0").to(device), own.tensor("labels").long().to(device)
    x = sample(net, noise, labels, sampler=sampler, **options | changed)
    return x.cpu(), z.images(f"{name}/x")


def test_samples(run: tuple[Path, str], device: torch.device) -> None:
    x, recorded = samples_of(*run, device, "consistency" if "consistency" in run[1] else "live_reflow")
    assert (x - recorded).abs().max() < 1e-4


# ---- negative controls


def error_of(kind: str, case: str, change: Callable[[Any, Any], tuple[Any, Any]], device: torch.device) -> float:
    """The largest error of v in a recorded case."""
    targets, _, c = targets_of(GOLDEN / f"targets_{kind}.npz", case, device, change)
    return float((targets.v.cpu() - c.images("out/v_t")).abs().max())


def setting(**changed: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda objective, draw: (objective.model_copy(update=changed), draw)


def other_size(objective: Any, draw: Any) -> tuple[Any, Any]:
    return objective, replace(draw, d=draw.d / 2)


def guided(objective: Any, draw: Any) -> tuple[Any, Any]:
    return objective, replace(draw, max_guided=len(draw.t))


def same(objective: Any, draw: Any) -> tuple[Any, Any]:
    return objective, draw


WRONG = {
    "half the gap": ("consistency", "case03", other_size),
    "half the teacher's step": ("consistency_distillation", "case00", other_size),
    "guided teacher": ("consistency_distillation", "case00", setting(guidance_scale=1.5)),
    "no clip": ("progressive", "case09", setting(clip=None)),
    "half the step": ("progressive", "case04", other_size),
    "other guidance of the first teacher": ("progressive", "case01", setting(guidance_scale=2.0)),
    "guidance of the second teacher": ("progressive", "case05", guided),
    "other guidance of pairs": ("livereflow", "case02", setting(guidance_scale=1.0)),
    "more steps": ("livereflow", "case02", setting(generation_steps=9)),
    "other level": ("livereflow", "case02", setting(finest_steps=64)),
}


@pytest.mark.parametrize(("kind", "case_name", "change"), WRONG.values(), ids=WRONG.keys())
def test_negative_control(
    kind: str, case_name: str, change: Callable[[Any, Any], tuple[Any, Any]], device: torch.device
) -> None:
    """Each change leaves the tolerance by far."""
    assert error_of(kind, case_name, same, device) <= 5e-5
    assert error_of(kind, case_name, change, device) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_negative_control_noise_left_at_the_end(kind: str, device: torch.device) -> None:
    """1e-5 of the noise: too little for most of v's tolerances, not for x_t's."""
    file = GOLDEN / f"targets_{kind}.npz"
    case = list(opened(file).cases())[1 if kind != "consistency" else -1]
    targets, _, c = targets_of(file, case, device, setting(sigma_min=0.0))
    assert (targets.x_t.cpu() - c.images("out/x_t")).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("name", "sampler", "changed"),
    [
        ("consistency/steps4_cfg1", "euler", {}),
        ("consistency/steps4_cfg1", "consistency", {"fresh_noise": torch.zeros(32, 8, 4, 8, 8).__getitem__}),
        ("livereflow/steps4_cfg1", "euler", {}),
        ("livereflow/steps8_cfg1", "live_reflow", {"finest_steps": 8}),
    ],
    ids=["consistency without noise, by Euler", "consistency with other noise", "reflow told d", "told d from 8 steps"],
)
def test_negative_control_samplers(
    name: str, sampler: SamplerKind, changed: dict[str, Any], device: torch.device
) -> None:
    x, recorded = samples_of(GOLDEN / "sampling.npz", name, device, sampler, **changed)
    assert (x - recorded).abs().max() > 1e-2
