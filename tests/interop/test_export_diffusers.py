"""Exported pipelines: the same samples from diffusers alone, in any number of steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortcutflow as sf
from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.interop.exports import to_diffusers as module
from shortcutflow.interop.exports.graph_source import source_of
from shortcutflow.interop.exports.to_diffusers import export_diffusers, pipeline_source
from shortcutflow.interop.exports.traced import trace
from shortcutflow.interop.model import load_folder
from shortcutflow.schedule import step_sizes
from tests.interop.exported import FAMILIES, autoencoder_in, model_in, noise_for, without_this_library

pytest.importorskip("diffusers")

CASES: dict[str, dict[str, Any]] = {
    "1 step": {"num_inference_steps": 1, "class_labels": [0, 3]},
    "3 steps": {"num_inference_steps": 3, "class_labels": [0, 3]},
    "4 steps, guided": {"num_inference_steps": 4, "class_labels": [1, 2], "guidance_scale": 1.5},
    "3 steps, scale 0": {"num_inference_steps": 3, "class_labels": [1, 2], "guidance_scale": 0.0},
    "128 steps": {"num_inference_steps": 128, "class_labels": 2},
    "150 steps": {"num_inference_steps": 150, "class_labels": 2},
    "sizes of one's own": {"num_inference_steps": [0.25, 0.75], "class_labels": 2},
    "no label": {"num_inference_steps": 2},
}
"""How the pipeline is called; two samples each."""

PROGRAM = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

folder, other, given, cases, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
DiffusionPipeline.from_pretrained(other, trust_remote_code=True)  # another network in the same process
pipe.set_progress_bar_config(disable=True)
noise = load_file(given)["noise"]
save_file({
    name: pipe(latents=noise, output_type="latent", **case).images for name, case in json.loads(cases).items()
}, out)
assert not any(name.startswith(("shortcutflow", "backbones")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pipe"
    assert "differs from the library's sampler by" in export_diffusers(source, folder)
    return folder


def pipeline_of(folder: Path, **parts: Any) -> Any:
    """The pipeline of a folder in this process."""
    from diffusers import FlowMapEulerDiscreteScheduler

    (code,) = (folder / "network").glob("*.py")
    network = module._imported(code).ShortcutNetwork.from_pretrained(folder / "network", low_cpu_mem_usage=False)
    pipe = module._imported(folder / "shortcut_pipeline.py").ShortcutPipeline(
        network=network, scheduler=FlowMapEulerDiscreteScheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(folder: Path, noise: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    labels = case.get("class_labels")
    y = torch.tensor(labels) if isinstance(labels, list) else labels
    steps, scale = case["num_inference_steps"], case.get("guidance_scale", 1.0)
    return sf.load(folder).sample(noise, y, steps=steps, guidance_scale=scale)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_diffusers_alone_gives_the_same_samples(source: Path, exported: Path, tmp_path: Path) -> None:
    """In a process that cannot import this library; and other samples with one weight changed."""
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    (code,) = (other / "network").glob("*.py")
    renamed = code.rename(code.with_name("another_network.py"))
    renamed.write_text(renamed.read_text().replace("aten.neg.default", "aten.abs.default"))
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"network": [renamed.stem, "ShortcutNetwork"]}))
    noise = noise_for(2, 3, 4, 4)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    without_this_library(
        PROGRAM, exported, other, tmp_path / "noise.safetensors", json.dumps(CASES), tmp_path / "got.safetensors",
        cache=tmp_path,
    )  # fmt: skip
    got = load_file(tmp_path / "got.safetensors")
    for name, case in CASES.items():
        assert largest(got[name], expected(source, noise, case)) < 1e-4, name
    assert largest(got["1 step"], got["3 steps"]) > 1e-2, "budgets must matter, or nothing was compared"


def test_a_changed_weight_is_seen(source: Path, exported: Path) -> None:
    pipe, noise = pipeline_of(exported), noise_for(2, 3, 4, 4)
    weight = pipe.network.get_parameter("network.patch_embedding.weight")
    want = expected(source, noise, CASES["3 steps"])
    assert largest(pipe(latents=noise, output_type="latent", **CASES["3 steps"]).images, want) < 1e-4
    with torch.no_grad():
        weight[0, 0] += 0.05
    assert largest(pipe(latents=noise, output_type="latent", **CASES["3 steps"]).images, want) > 1e-3


@pytest.mark.parametrize(
    "changes", [{"sampler": "consistency"}, {"sampler": "live_reflow"}, {"flow_only": True}, {"finest_steps": 4}]
)  # fmt: skip
def test_samplers(changes: dict[str, Any], source: Path, exported: Path, tmp_path: Path) -> None:
    """What the config says of the sampler is followed as the library's own sampler does."""
    model, folder = tmp_path / "model", tmp_path / "pipe"
    shutil.copytree(source, model)
    shutil.copytree(exported, folder)
    for path in (model / "config.json", folder / "network/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    # The step size a network is told at the finest budget is part of its graph; only the sampler's side is looked at.
    pipe, net, noise = pipeline_of(folder), load_folder(source).network, noise_for(2, 3, 4, 4)
    config = load_folder(model).config
    for steps in (1, 3, 6):
        numbers = [torch.Generator().manual_seed(0) for _ in range(2)]
        got = pipe(2, steps, latents=noise, generator=numbers[0], output_type="latent").images
        want = sf.sample(
            net, noise, torch.full((2,), 2), steps=steps, finest_steps=config.finest_steps, sampler=config.sampler,
            flow_only=config.flow_only, generator=numbers[1],
        )  # fmt: skip
        assert largest(got, want) < 1e-4, steps
    assert largest(got, load_folder(source).sample(noise, 2, steps=6)) > 1e-4 or changes == {"finest_steps": 4}


def test_step_sizes_are_the_library_s() -> None:
    names: dict[str, Any] = {}
    text = pipeline_source()
    rule = text[text.index("def levels_of") : text.index("class ShortcutPipeline")]
    exec("import math\nfrom collections.abc import Sequence\n" + rule, names)
    assert all(names["step_sizes"](n, m) == step_sizes(n, m) for m in (2, 8, 128) for n in range(1, 200))
    assert "import shortcutflow" not in text
    assert "from shortcutflow" not in text


def test_files(exported: Path, source: Path) -> None:
    """Text and safetensors; weights as they were; no path of this machine."""
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    (code,) = (exported / "network").glob("*.py")
    assert files == {
        "model_index.json", "shortcut_pipeline.py", "README.md", "network/config.json", f"network/{code.name}",
        "network/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
    }  # fmt: skip
    held = load_file(exported / "network/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(source / "weights.safetensors").items():
        assert torch.equal(held[f"network.{name}"], tensor)
    for name in files:
        assert str(Path(sf.__file__).parents[1]).encode() not in (exported / name).read_bytes(), name


def test_pictures(exported: Path, source: Path) -> None:
    pipe, noise = pipeline_of(exported), noise_for(2, 3, 4, 4)
    want = (expected(source, noise, CASES["1 step"]) / 2 + 0.5).clamp(0, 1)
    for kind in ("pt", "np"):
        images = torch.as_tensor(pipe([0, 3], 1, latents=noise, output_type=kind).images)
        assert largest(images if kind == "pt" else images.permute(0, 3, 1, 2), want) < 1e-4
    (pictures,) = pipe([0, 3], 1, latents=noise, return_dict=False)
    assert [(picture.size, picture.mode) for picture in pictures] == [((4, 4), "RGB")] * 2
    one, same, other = (
        pipe(1, 2, generator=torch.Generator().manual_seed(seed), output_type="latent").images for seed in (0, 0, 1)
    )
    assert one.shape == (1, 3, 4, 4)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "steps 0": ({"num_inference_steps": 0}, "steps must be at least 1"),
    "sizes": ({"num_inference_steps": [0.5, 0.4]}, "add up to 1"),
    "label": ({"class_labels": 5}, "labels must be from 0 to 4"),
    "counts": ({"class_labels": [1, 2], "batch_size": 3}, "as many of each"),
    "none": ({"batch_size": 0}, "at least 1"),
    "shape": ({"latents": torch.zeros(1, 3, 8, 8)}, "latents must have shape"),
    "condition": ({"condition": torch.zeros(1, 2)}, "not conditioned on tensors"),
    "output type": ({"output_type": "jpg"}, "'pil', 'np', 'pt' or 'latent'"),
}


@pytest.mark.parametrize(("options", "says"), MISTAKES.values(), ids=MISTAKES)
def test_calls_that_are_refused(options: dict[str, Any], says: str, exported: Path) -> None:
    with pytest.raises(ValueError, match=says):
        pipeline_of(exported)(**options)


def test_half_precision_is_refused_and_autocast_works(exported: Path, source: Path) -> None:
    pipe, noise = pipeline_of(exported), noise_for(2, 3, 4, 4)
    net, t = load_folder(source).network, torch.tensor([511 / 512, 1.0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = pipe.network(noise, t, t, torch.tensor([0, 4]))
        assert torch.equal(got, net(noise, t, t, torch.tensor([0, 4])))
    with pytest.raises(ValueError, match=r"float32, not torch\.bfloat16"):
        pipe.to(torch.bfloat16)(1)


def test_latents_with_their_autoencoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = autoencoder_in(tmp_path / "vae")
    source = model_in(tmp_path / "model", shape=(4, 4, 4), vae="some/vae")
    with pytest.raises(ValueError, match="latents of 4 channels"):
        export_diffusers(model_in(tmp_path / "pixels"), tmp_path / "no", decoder=str(vae))
    export_diffusers(source, tmp_path / "pipe", decoder=str(vae))
    noise = noise_for(2, 4, 4, 4)
    want = load_autoencoder(vae).decode(sf.load(source).sample(noise, 1, steps=2)) / 2 + 0.5
    assert json.loads((tmp_path / "pipe/model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    with_vae = pipeline_of(tmp_path / "pipe", vae=AutoencoderKL.from_pretrained(tmp_path / "pipe/vae"))
    assert largest(with_vae(1, 2, latents=noise, output_type="pt").images, want) < 1e-4
    alone = pipeline_of(tmp_path / "pipe")
    assert alone(1).images.shape == (1, 4, 4, 4), "latents, as they are no pictures"
    with pytest.raises(ValueError, match="latents of some/vae"):
        alone(1, output_type="pil")


def test_what_gives_other_samples_is_thrown_away(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        text, tensors = source_of(*arguments, **options)
        assert "aten.add.Tensor" in text
        return text.replace("aten.add.Tensor", "aten.sub.Tensor", 1), tensors

    monkeypatch.setattr(module, "source_of", wrong)
    with pytest.raises(ValueError, match="gives other samples than the library's sampler"):
        export_diffusers(source, tmp_path / "pipe")
    assert not list(tmp_path.iterdir())


def test_existing_folders_stay(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists already, and holds notes\.txt"):
        export_diffusers(source, tmp_path / "pipe")
    assert (tmp_path / "pipe/notes.txt").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_diffusers(source, tmp_path / "none/pipe")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"shortcutflow\[latents\]"):
        export_diffusers(source, tmp_path / "other")


class Branching(torch.nn.Module):
    """Runs one graph or another, depending on numbers."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, d: torch.Tensor, y: None) -> torch.Tensor:
        return torch.cond(t.sum() > 1, lambda x: x + 1, lambda x: x - 1, (x,))


class Autocasting(torch.nn.Linear):
    """Switches autocast on."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, d: torch.Tensor, y: None) -> torch.Tensor:  # type: ignore[override]
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize(
    ("network", "says"), [(Branching, "which has no source"), (lambda: Autocasting(4, 4), "switches autocast on")]
)  # fmt: skip
def test_networks_without_source(network: Callable[[], torch.nn.Module], says: str) -> None:
    given = torch.zeros(1, 4, 4), torch.zeros(1), torch.zeros(1), None
    with pytest.raises(ValueError, match=says):
        source_of(trace(network(), given, what="it"), backbone="it", version="0")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"dit"}))
def test_families(family: str, tmp_path: Path) -> None:
    """Every family, as pictures and as sequences conditioned on tensors or on nothing, without its code."""
    cases = {
        "image": {"num_classes": None, "null_y": None},
        "sequence": {"shape": (6, 4), "num_classes": None, "null_y": 0, "condition_shape": (3,)},
    }
    if family == "diffusers_unet":
        del cases["sequence"]  # it makes images only
    for name, changes in cases.items():
        source = model_in(tmp_path / f"{name}-model", family, **changes)
        export_diffusers(source, tmp_path / name)
        model = sf.load(source)
        noise = noise_for(5, *model.shape)
        given = {} if name == "image" else {"condition": noise_for(5, 3)}
        got = pipeline_of(tmp_path / name)(num_inference_steps=3, latents=noise, output_type="latent", **given).images
        assert largest(got, model.sample(noise, given.get("condition"), steps=3)) < 1e-4
