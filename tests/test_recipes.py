"""Every recipe keeps its promise: its docstring says what a reader needs, and says the truth about its config."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import backbones
from shortcutflow.commands.recipes import RECIPE_GROUP, load_recipe
from shortcutflow.config import RunConfig, validated
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.evaluation.protocol_evaluation import ProtocolEvaluation
from shortcutflow.interop.convert import convert
from shortcutflow.train.metrics import PEAK_BFLOAT16
from tests.interop.public_layouts import PublicTransformer

ROOT = Path(__file__).parent.parent
PAPER = ["dit_b_celebahq", "dit_b_imagenet", "dit_xl_imagenet"]
LARGE = [*PAPER, "unet_cifar10", "finetune_from_sit"]


def installed() -> list[str]:
    return sorted(entry.name for entry in entry_points(group=RECIPE_GROUP))


def docstring(name: str) -> str:
    return import_module(f"recipes.{name}").__doc__ or ""


def said(name: str, pattern: str) -> list[str]:
    """The groups of the first match in a recipe's docstring."""
    found = re.search(pattern, docstring(name))
    assert found is not None, f"{name} does not say {pattern}"
    return list(found.groups())


def on_meta(config: RunConfig, num_classes: int | None) -> Any:
    """The recipe's network at its real size, without memory."""
    shape = (3, 32, 32) if isinstance(config.data, ImageFolderData) else (4, 32, 32)
    options = {"num_classes": num_classes} | config.backbone.options
    with torch.device("meta"):
        return backbones.create(config.backbone.name, shape=shape, finest_steps=config.finest_steps, **options)


# What a recipe says


def test_every_file_is_a_recipe_by_name() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][RECIPE_GROUP]
    assert installed() == sorted(declared), "the package must be installed again after new entry points"
    assert {path.stem for path in (ROOT / "recipes").glob("[a-z]*.py")} <= set(installed())


@pytest.mark.parametrize("name", installed())
def test_config_is_valid_and_round_trips(name: str) -> None:
    """Also those made by changing another, which nothing has validated."""
    config = load_recipe(name)
    assert config.name == name
    assert validated(json.loads(config.model_dump_json()), where=name) == config


PROMISED = {
    "paper": r"arXiv \d{4}\.\d{5}",
    "data": r"\nData[^\n]*:",
    "command": r"\nCommand::\n",
    "torchrun": r"torchrun --standalone --nproc-per-node \d recipes/NAME\.py",
    "smoke": r"python recipes/NAME\.py --smoke",
    "hardware": r"\nHardware: .*GPU",
    "hours": r"GPU-hours on H100",
    "computed": r"Computed[\s\S]*not\smeasured",
    "metric": r"Expected FID-50k at 128 / 4 / 1 steps: ",
    "protocol": r"[Pp]rotocol",
    "re-runs": r"[Ii]ndependent\sre-run",
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("part", PROMISED)
def test_docstring_promises(name: str, part: str) -> None:
    said(name, f"({PROMISED[part].replace('NAME', name)})")


@pytest.mark.parametrize("name", LARGE)
def test_evaluation_is_the_protocol_that_is_promised(name: str) -> None:
    evaluation = load_recipe(name).evaluation
    assert isinstance(evaluation, ProtocolEvaluation)
    assert (evaluation.steps, evaluation.samples, evaluation.guidance_scale) == ((1, 4, 128), 50_000, 1)
    assert evaluation.protocol == ("clean-fid" if name == "unet_cifar10" else "released-code")
    if name in ("dit_b_celebahq", "dit_b_imagenet"):
        said(name, rf"(--protocol released-code \\?\n        --out {evaluation.reference})")


def test_negative_control_a_recipe_that_promises_less() -> None:
    with pytest.raises(AssertionError, match="digits does not say"):
        said("digits", PROMISED["hours"])


@pytest.mark.parametrize(
    ("name", "distances"),
    [
        ("dit_b_celebahq", (6.9, 13.8, 20.5)),
        ("dit_b_imagenet", (15.5, 28.3, 40.3)),
        ("dit_xl_imagenet", (3.8, 7.8, 10.6)),
    ],
    ids=PAPER,
)
def test_published_numbers(name: str, distances: tuple[float, ...]) -> None:
    found = said(name, r"128 / 4 / 1 steps: ([\d.]+) / ([\d.]+) / ([\d.]+), as the authors' README")
    assert tuple(map(float, found)) == distances


@pytest.mark.parametrize("name", LARGE)
def test_hours_follow_from_operations(name: str) -> None:
    """Forward passes of 3 for the gradient and those of the targets, at the peak: less is impossible."""
    config = load_recipe(name)
    net = on_meta(config, None)
    batch = config.training.global_batch_size
    evaluations = 3 + config.objective.target_evaluations(batch)
    hours, peak = map(float, said(name, r"at least ([\d.]+) GPU-hours on H100 at (\d+) TFLOP/s"))
    giga, targets = map(float, said(name, r"\(([\d.]+) GFLOP a[\s\S]*?sample\s+and\s+([\d.]+)\s+for"))
    assert peak * 1e12 == PEAK_BFLOAT16["H100"]
    assert giga == pytest.approx(net.flops() / 1e9, abs=0.1)
    assert targets == pytest.approx(evaluations - 3, abs=0.01)
    operations = net.flops() * evaluations * batch * config.training.steps
    assert hours == pytest.approx(operations / (peak * 1e12) / 3600, rel=0.05)


def test_cifar_takes_under_an_hour_at_a_tenth_of_the_peak() -> None:
    (hours,) = map(float, said("unet_cifar10", r"at least ([\d.]+) GPU-hours on H100 at \d+ TFLOP/s"))
    assert hours * 10 < 1


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        ("dit_b_celebahq", None, 130.32), ("dit_b_imagenet", 1000, 131.09), ("dit_xl_imagenet", 1000, 676.44),
        ("unet_cifar10", None, 38.77), ("finetune_from_sit", 1000, 676.44), ("dit_b_celebahq_released", None, 130.32),
        ("dit_b_imagenet_released", 1000, 131.09), ("dit_xl_imagenet_released", 1000, 676.44),
    ],
)  # fmt: skip
def test_real_size(name: str, num_classes: int | None, millions: float) -> None:
    parameters = sum(p.numel() for p in on_meta(load_recipe(name), num_classes).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.01)


# What the released command has otherwise


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("name", PAPER)
def test_released_differs_in_the_documented_fields_only(name: str) -> None:
    """Each with the two values that the docstring gives; a value that is not there is in brackets."""
    paper, released = (dict(leaves(load_recipe(n).model_dump(mode="json"))) for n in (name, f"{name}_released"))
    differing = {
        field: (paper.get(field), released.get(field))
        for field in {**paper, **released}
        if paper.get(field) != released.get(field)
    }
    rows = re.findall(r"^    ([a-z_.]+) {2,}(\S+) -> ([^\s:,]+)", docstring(name), re.MULTILINE)
    assert {field for field, _, _ in rows} == set(differing)
    for field, old, new in rows:
        was, now = differing[field]
        assert old.startswith("(") if was is None and old != "null" else old in (was, json.dumps(was)), field
        assert new in (now, json.dumps(now)), field


@pytest.mark.parametrize("name", PAPER)
def test_released_is_what_the_command_says(name: str) -> None:
    config = load_recipe(f"{name}_released")
    assert config.objective.kind == "shortcut"
    n = config.objective.n_bootstrap(config.training.global_batch_size)
    assert n == config.training.global_batch_size // 8
    assert (config.target_weights, config.sample_weights) == ("ema", "current")
    assert config.objective.guidance_scale == (1.0 if "celeba" in name else 1.5)
    assert [config.emas["ema"].decay_at(step) for step in (0, 10**6)] == [0.999, 0.999]
    assert load_recipe(name).emas["ema"].decay_at(0) == 0.1


def test_twin_averages_of_cifar() -> None:
    config = load_recipe("unet_cifar10")
    assert config.emas[config.target_weights].decay_at(10**6) == 0.95
    assert config.emas[config.sample_weights].decay_at(10**6) == 0.9999


# Fine-tuning begins with a model of another project


def test_sit_converts_to_the_recipes_network(tmp_path: Path) -> None:
    """Of SiT-XL/2's layout with fewer and narrower blocks: the same options but for those."""
    config = load_recipe("finetune_from_sit")
    net = PublicTransformer(size=32, width=64, depth=1, heads=1, classes=1000)
    torch.save(net.state_dict(), tmp_path / "SiT.pt")
    converted, _ = convert(tmp_path / "SiT.pt", tmp_path / "model", heads=1)
    small = {"width": 64, "depth": 1, "heads": 1}
    assert converted.backbone.name == config.backbone.name
    assert converted.backbone.options == config.backbone.options | small
    assert (converted.shape, converted.num_classes) == ((4, 32, 32), 1000)
    assert converted.flow_only
