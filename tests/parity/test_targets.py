"""The released code's targets, row for row, from its recorded draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shortcutflow as sf
from shortcutflow.objectives import Context
from shortcutflow.types import Targets
from tests.conftest import GOLDEN
from tests.parity.recorded import Recording, build, flow_draw, shortcut_draw, shortcut_objective


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind in ("shortcut", "naive"):
        if f"{kind}_case" in metafunc.fixturenames:
            folder = Path(metafunc.config.getoption("--golden"))
            cases = [(f, c) for f in sorted(folder.glob(f"targets_{kind}*.npz")) for c in Recording.open(f).cases()]
            metafunc.parametrize(f"{kind}_case", cases, ids=lambda fc: f"{fc[0].stem}-{fc[1]}")


def shortcut_targets(file: Path, case: str, device: torch.device, **changed: object) -> tuple[Targets, Recording]:
    z = Recording.open(file)
    c = z.below(case)
    config = c.json("config")
    objective = shortcut_objective(config).model_copy(update=changed)
    net = build(z.json("config"), z.params("params_ema" if config["bootstrap_ema"] else "params")).to(device)
    labels = (c if config.get("own_labels") else z).tensor("labels").long()
    draw = shortcut_draw(objective, config, c.below("draw"))
    draw = type(draw)(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(draw).items()})
    targets = objective.targets(
        net, z.images("images").to(device), labels.to(device), draw, Context(null_y=config["num_classes"])
    )
    return targets, c


def test_shortcut(shortcut_case: tuple[Path, str], device: torch.device) -> None:
    targets, c = shortcut_targets(*shortcut_case, device)
    n, out = targets.n_bootstrap, c.below("out")
    assert torch.equal(targets.t.cpu(), out.tensor("t"))
    assert torch.equal(targets.d.cpu(), torch.exp2(-out.tensor("dt_base")))
    assert targets.y is not None
    assert torch.equal(targets.y.cpu(), out.tensor("labels").long())
    assert (targets.x_t.cpu() - out.images("x_t")).abs().max() <= 4e-6
    error = (targets.v.cpu() - out.images("v_t")).abs()
    assert error[:n].max() <= 2e-5
    assert error[n:].max() <= 2e-6
    for ours, theirs in (("bootstrap", "bootstrap"), ("b1", "b1"), ("b2", "b2")):
        expected = float(out.array(f"info/v_magnitude_{theirs}"))
        assert float(targets.metrics[f"v_magnitude_{ours}"].value) == pytest.approx(expected, abs=1e-5)


def test_naive(naive_case: tuple[Path, str], device: torch.device) -> None:
    file, case = naive_case
    z = Recording.open(file)
    c = z.below(case)
    config = c.json("config")
    objective = sf.FlowMatchingObjective.released(config["denoise_timesteps"], config["class_dropout_prob"])
    images = (c if "images" in c else z).images("images")
    if "draw/x0" in c:
        noise = c.images("draw/x0")
    else:  # "latent" data sets hold noise and data side by side in the channels
        noise, images = images.chunk(2, dim=1)
    draw = flow_draw(objective, config, c.below("draw"), noise)
    labels = (c if config.get("own_labels") else z).tensor("labels").long()
    targets = objective.targets(_never_called, images, labels, draw, Context(null_y=config["num_classes"]))
    out = c.below("out")
    assert torch.equal(targets.t, out.tensor("t"))
    assert targets.y is not None
    assert torch.equal(targets.y, out.tensor("labels").long())
    assert (targets.x_t - out.images("x_t")).abs().max() <= 4e-6
    assert (targets.v - out.images("v_t")).abs().max() <= 2e-6


def _never_called(*_: object) -> torch.Tensor:
    raise AssertionError("flow matching asks no network for its targets")


@pytest.mark.parametrize(
    "changed",
    [{"clip": None}, {"sigma_min": 0.0}, {"guidance_scale": 1.0}, {"rows": "released_dt_bias"}, {"finest_steps": 64}],
    ids=str,
)
def test_negative_control(changed: dict[str, object], device: torch.device) -> None:
    """Each changed switch leaves the tolerance in at least one of the recorded cases."""
    worst = 0.0
    for case in Recording.open(GOLDEN / "targets_shortcut_b64.npz").cases():
        try:
            targets, c = shortcut_targets(GOLDEN / "targets_shortcut_b64.npz", case, device, **changed)
        except ValueError:  # 3 of 7 sizes asked where the recording has another number of rows
            worst = 1.0
            continue
        worst = max(worst, float((targets.v.cpu() - c.images("out/v_t")).abs().max()))
    assert worst > 4e-5, changed
