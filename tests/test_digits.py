"""Quality on real digits: the paper's claim at a size that runs anywhere, and the released code's training curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import shortcutflow as sf
from recipes.digits import paper_recipe, recipe
from shortcutflow.cli import main
from shortcutflow.config import RunConfig
from shortcutflow.data.digits import load_digits
from tests.conftest import GOLDEN
from tests.parity.recorded import Recording, build, shortcut_objective


def train_as_released(flags: dict, arch: dict, *, steps: int, seed: int) -> dict[str, np.ndarray]:
    """The first steps of the released training on the digits, unconditional, as tests/golden/digits_reference.npz."""
    images = torch.from_numpy(load_digits()[0])
    order = np.random.default_rng(seed).integers(0, len(images), (flags["max_steps"], flags["batch_size"]))
    torch.manual_seed(seed)
    net = build(arch, None)
    average = sf.EMA(net, sf.EMAConfig(decay=flags["target_update_rate"], warm_up=False))
    objective = shortcut_objective(flags)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=flags["lr"], weight_decay=flags["weight_decay"], fused=True
    )
    null = torch.full((flags["batch_size"],), arch["num_classes"])
    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {"loss_flow": [], "loss_bootstrap": [], "v_magnitude_bootstrap": []}
    for step, rows in enumerate(order[:steps]):
        batch = images[rows]
        report = objective(
            net, batch, null, target_net=average.network, null_y=arch["num_classes"], generator=generator
        )
        report.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(net, step)
        for name, values in curves.items():
            values.append(float(report.metrics[name]))
    return {name: np.reshape(values, (-1, 100)).mean(1) for name, values in curves.items()}


def farthest(curve: np.ndarray, others: list[np.ndarray]) -> float:
    """Distance of a curve to the mean of others, relative to it, averaged over the curve."""
    mean = np.mean(others, axis=0)
    return float(np.mean(np.abs(curve - mean) / mean))


@pytest.mark.parametrize("steps", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_released_training_curves(steps: int) -> None:
    """Losses and bootstrap velocities, in means of 100 steps, beside three recorded runs.

    The flow loss and the size of bootstrap targets must lie about as close to the recorded runs as these lie to each
    other. The bootstrap loss in the middle of training depends on the initial draw more than three runs show: six draws
    gave distances of 0.09, 0.09, 0.22, 0.29, 0.40 and 0.48, so its limit is only that of their range. Targets from the
    current weights, the control, are noticed by the size of bootstrap targets.
    """
    z = Recording.open(GOLDEN / "digits_reference.npz")
    curves = train_as_released(z.json("flags"), z.json("arch"), steps=steps, seed=0)
    runs = json.loads((GOLDEN / "digits_summary.json").read_text())["runs"]
    recorded = [run["mean100"] for run in runs.values() if run["steps"] == 2000 and run["bootstrap_ema"] == 1]
    assert len(recorded) == 3
    for name, curve in curves.items():
        seeds = [np.array(run[name])[: len(curve)] for run in recorded]
        spread = [farthest(seed, [other for other in seeds if other is not seed]) for seed in seeds]
        # Twice, because the distance to a mean of three is compared with distances to means of two.
        limit = 0.5 if name == "loss_bootstrap" else 2 * max(spread)
        assert farthest(curve, seeds) <= limit, (name, farthest(curve, seeds), spread)
        if name == "v_magnitude_bootstrap":
            no_average = [r["mean100"] for r in runs.values() if r["steps"] == 2000 and r["bootstrap_ema"] == 0]
            assert all(farthest(np.array(wrong[name])[: len(curve)], seeds) > 5 * limit for wrong in no_average)


@pytest.mark.slow
def test_recipe_reaches_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step 98 % are read and the distance is at most 0.25, the paper's 0.7; flow matching's is far larger."""
    monkeypatch.chdir(tmp_path)
    rows = {}
    chosen = {"best": ["digits"], "paper": ["digits_paper"], "flow": ["digits_paper", "--objective", "flow_matching"]}
    for kind, options in chosen.items():
        with pytest.raises(SystemExit):
            main(["train", *options, "--run-dir", kind, "evaluation.steps=[1,128]"])
        report = json.loads((tmp_path / kind / "evaluation-digits.json").read_text())
        rows[kind] = {row["steps"]: row["values"] for row in report["rows"]}
    best, paper, flow = (rows[kind] for kind in chosen)
    assert best[1]["label_accuracy"] >= 0.98
    assert best[1]["fid"] <= 0.25
    assert best[128]["fid"] <= 0.18
    assert 0.4 <= paper[1]["fid"] <= 0.7
    assert paper[128]["fid"] <= 0.3
    assert flow[1]["fid"] >= 5


def test_the_recipes_are_what_they_say() -> None:
    """The best settings differ from the paper's in four places and cost the same."""
    best, paper = recipe(), paper_recipe()
    assert best.objective.target_evaluations(64) == paper.objective.target_evaluations(64)
    assert paper.emas[paper.target_weights].warm_up, "without a warm-up one-step samples are noise"
    assert paper.coupling is None
    assert best.coupling is not None
    differing = {name for name in type(best).model_fields if getattr(best, name) != getattr(paper, name)}
    assert differing == {"name", "objective", "target_weights", "coupling"}
    assert RunConfig.model_validate(best.model_dump()) == best
