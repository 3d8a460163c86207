"""Whole training steps of the released code: loss, gradients, AdamW, average, from its recorded draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shortcutflow as sf
from backbones.dit import DiT
from shortcutflow.objectives import Context
from shortcutflow.types import LossReport
from tests.conftest import GOLDEN
from tests.parity.recorded import Recording, build, flax_names, flow_draw, shortcut_draw, shortcut_objective


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    if "steps_file" in metafunc.fixturenames:
        files = sorted(folder.glob("train_steps_shortcut*.npz"))
        metafunc.parametrize("steps_file", files, ids=lambda f: f.stem)
    if "variant" in metafunc.fixturenames:
        found = []
        for file in sorted(folder.glob("train_step_variants*.npz")):
            names = {n.split("/")[0] for n in Recording.open(file).arrays}
            found += [(file, n) for n in sorted(names) if n.startswith("shortcut") or n == "naive"]
        metafunc.parametrize("variant", found, ids=lambda v: f"{v[0].stem}-{v[1]}")


def optimizer_of(net: DiT, flags: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad],
        lr=flags["lr"], betas=(flags["beta1"], flags["beta2"]), weight_decay=flags["weight_decay"], fused=True,
    )  # fmt: skip


def loss_of(net: DiT, average: sf.EMA, flags: dict[str, Any], step: Recording) -> LossReport:
    """The recorded step's loss: the batch permuted, labels nulled if unconditional, the recorded draws."""
    order = step.tensor("draw/id_perm").long()
    images, labels = step.images("images")[order], step.tensor("labels").long()[order]
    if flags["cfg_scale"] == 0:
        labels = torch.full_like(labels, flags["num_classes"])
    draws = step.below("draw")
    if flags["train_type"] == "naive":
        flow = sf.FlowMatchingObjective.released(flags["denoise_timesteps"], flags["class_dropout_prob"])
        noise = draws.images("x0")
        draw = flow_draw(flow, flags, draws, noise)
        return flow.regress(net, flow.targets(net, images, labels, draw, Context(null_y=flags["num_classes"])))
    else:
        shortcut = shortcut_objective(flags)
        target_net = average.network if flags["bootstrap_ema"] else net
        draw = shortcut_draw(shortcut, flags, draws)
        targets = shortcut.targets(target_net, images, labels, draw, Context(null_y=flags["num_classes"]))
        return shortcut.regress(net, targets)


def grads_of(net: DiT) -> dict[str, np.ndarray]:
    return flax_names(net, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()})


def assert_same_params(net: DiT, recorded: dict[str, np.ndarray], lr: float) -> None:
    for name, value in flax_names(net, net.state_dict()).items():
        # The gradient of a key's bias is zero but for rounding, so Adam moves it arbitrarily, by a few lr.
        tolerance = 2.5 * lr if name.endswith("/Dense_1/bias") and name.count("/") == 2 else 1e-6
        assert np.abs(value - recorded[name]).max() <= tolerance, name


def check_step(net: DiT, average: sf.EMA, flags: dict[str, Any], step: Recording) -> LossReport:
    report = loss_of(net, average, flags, step)
    net.zero_grad()
    report.loss.backward()
    assert float(report.metrics["loss"]) == pytest.approx(float(step.array("info/loss")), abs=1e-5)
    # Relative, since the norm is about 12: a float64 evaluation of the same gradient is 7e-7 away from the recording.
    norm = np.sqrt(sum(np.square(grad.astype(np.float64)).sum() for grad in grads_of(net).values()))
    assert float(norm) == pytest.approx(float(step.array("info/grad_norm")), rel=1e-5)
    recorded = step.params("grads")
    for name, grad in grads_of(net).items():
        # 2e-6 absolute, and as much again relative: gradients reach 0.9 here, and a float64 evaluation is as far from
        # the recording (1.2e-6 at the first step) as this float32 one.
        assert np.abs(grad - recorded[name]).max() <= 2e-6 * (1 + np.abs(recorded[name]).max()), name
    return report


def test_three_steps(steps_file: Path) -> None:
    z = Recording.open(steps_file)
    flags = z.json("flags")
    net = build(z.json("config"), z.params())
    average = sf.EMA(build(z.json("config"), z.params("params_ema")), _released_average(flags))
    optimizer = optimizer_of(net, flags)
    steps = sorted({name.split("/")[0] for name in z.arrays if name.startswith("step")})
    assert len(steps) >= 3
    for i, name in enumerate(steps):
        step = z.below(name)
        report = check_step(net, average, flags, step)
        for kind in ("flow", "bootstrap"):
            assert float(report.metrics[f"loss_{kind}"]) == pytest.approx(
                float(step.array(f"info/loss_{kind}")), abs=1e-5
            )
        optimizer.step()
        average.update(net, i)
        assert_same_params(net, step.params(), flags["lr"])
        if step.params("params_ema"):
            assert_same_params(average.network, step.params("params_ema"), flags["lr"])  # type: ignore[arg-type]


def test_variant(variant: tuple[Path, str]) -> None:
    file, name = variant
    z = Recording.open(file)
    step = z.below(name)
    flags = step.json("flags")
    ignore = name == "naive"
    net = build(z.json("config"), z.params(), ignore_step_size=ignore)
    average = sf.EMA(build(z.json("config"), z.params("params_ema")), _released_average(flags))
    optimizer = optimizer_of(net, flags)
    check_step(net, average, flags, step)
    optimizer.step()
    average.update(net, 0)
    if step.params():
        assert_same_params(net, step.params(), flags["lr"])
        assert_same_params(average.network, step.params("params_ema"), flags["lr"])  # type: ignore[arg-type]


def _released_average(flags: dict[str, Any]) -> sf.EMAConfig:
    return sf.EMAConfig(decay=flags["target_update_rate"], warm_up=False)


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"lr": 1.02e-4}, {"beta2": 0.99}], ids=str)
def test_negative_control_optimizer(wrong: dict[str, float]) -> None:
    z = Recording.open(GOLDEN / "train_steps_shortcut.npz")
    flags = z.json("flags")
    net = build(z.json("config"), z.params())
    average = sf.EMA(build(z.json("config"), z.params("params_ema")))
    optimizer = optimizer_of(net, flags | wrong)
    for name in ("step1", "step2"):
        check = loss_of(net, average, flags, z.below(name))
        net.zero_grad()
        check.loss.backward()
        optimizer.step()
    with pytest.raises(AssertionError):
        assert_same_params(net, z.below("step2").params(), flags["lr"])


def test_negative_control_average() -> None:
    """The warm-up of the average, sound as it is, is not what was released."""
    z = Recording.open(GOLDEN / "train_steps_shortcut.npz")
    net = build(z.json("config"), z.params())
    average = sf.EMA(build(z.json("config"), z.params("params_ema")), sf.EMAConfig(decay=0.999, warm_up=True))
    average.update(net, 0)
    with pytest.raises(AssertionError):
        assert_same_params(average.network, z.below("step1").params("params_ema"), 1e-4)  # type: ignore[arg-type]
