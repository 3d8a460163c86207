"""Exported pipelines: the library's samples from diffusers' interface, in any number of steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortcutflow as sf
from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.interop import export
from shortcutflow.interop.export import export_model
from tests.interop.exported import FAMILIES, autoencoder_in, model_in, noise_for

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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pipe"
    assert "differs from the library's sampler by" in export_model(source, folder, "diffusers")
    return folder


def pipeline_of(folder: Path, **parts: Any) -> Any:
    """The pipeline of a folder."""
    from shortcutflow.interop.diffusers_pipeline import ShortcutPipeline

    pipe: Any = ShortcutPipeline.from_pretrained(folder, **parts)
    return pipe


def expected(folder: Path, noise: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    labels = case.get("class_labels")
    y = torch.tensor(labels) if isinstance(labels, list) else labels
    steps, scale = case["num_inference_steps"], case.get("guidance_scale", 1.0)
    return sf.load(folder).sample(noise, y, steps=steps, guidance_scale=scale)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_a_guidance_scale_that_is_an_input_stays_one(tmp_path: Path) -> None:
    options = FAMILIES["dit"] | {"guidance_input": True}
    source = model_in(tmp_path / "model", backbone={"name": "dit", "options": options})
    export_model(source, tmp_path / "pipe", "diffusers")
    noise, case = noise_for(2, 3, 4, 4), {"num_inference_steps": 2, "class_labels": [1, 2]}

    def samples(scale: float) -> torch.Tensor:
        of = pipeline_of(tmp_path / "pipe")(**case, guidance_scale=scale, latents=noise, output_type="latent").images
        assert largest(of, expected(source, noise, case | {"guidance_scale": scale})) < 1e-5
        return torch.as_tensor(of)

    assert largest(samples(2.0), samples(3.0)) > 1e-2


def test_the_same_samples(source: Path, exported: Path, tmp_path: Path) -> None:
    """Of the folder, and of the pipeline that diffusers itself saved again."""
    noise = noise_for(2, 3, 4, 4)
    pipe = pipeline_of(exported)
    pipe.save_pretrained(tmp_path / "again")
    samples = {}
    for name, case in CASES.items():
        samples[name] = pipe(latents=noise, output_type="latent", **case).images
        assert largest(samples[name], expected(source, noise, case)) < 1e-4, name
        again = pipeline_of(tmp_path / "again")(latents=noise, output_type="latent", **case).images
        assert torch.equal(again, samples[name])
    assert largest(samples["1 step"], samples["3 steps"]) > 1e-2, "steps must matter, or nothing was compared"


def test_a_changed_weight_is_seen(source: Path, exported: Path) -> None:
    pipe, noise = pipeline_of(exported), noise_for(2, 3, 4, 4)
    weight = pipe.network.network.get_parameter("patch_embedding.weight")
    want = expected(source, noise, CASES["3 steps"])
    assert largest(pipe(latents=noise, output_type="latent", **CASES["3 steps"]).images, want) < 1e-4
    with torch.no_grad():
        weight[0, 0] += 0.05
    assert largest(pipe(latents=noise, output_type="latent", **CASES["3 steps"]).images, want) > 1e-3


@pytest.mark.parametrize(
    "changes", [{"sampler": "consistency"}, {"sampler": "live_reflow"}, {"flow_only": True}, {"finest_steps": 4}]
)  # fmt: skip
def test_samplers(changes: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """What the config says of the sampler is followed as the library's own sampler does."""
    model = model_in(tmp_path / "model", **changes)
    export_model(model, tmp_path / "pipe", "diffusers")
    noise = noise_for(2, 3, 4, 4)
    for steps in (1, 3, 6):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        pipe = pipeline_of(tmp_path / "pipe")
        samples = pipe(2, steps, latents=noise, generator=generators[0], output_type="latent").images
        assert largest(samples, sf.load(model).sample(noise, 2, steps=steps, generator=generators[1])) < 1e-4, steps
    assert largest(samples, sf.load(source).sample(noise, 2, steps=6)) > 1e-4


def test_files(exported: Path, source: Path) -> None:
    """Text and safetensors; weights as they were; no path of this machine."""
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "README.md", "network/config.json", "network/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    held = load_file(exported / "network/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(source / "weights.safetensors").items():
        assert torch.equal(held[f"network.{name}"], tensor)
    for name in files:
        assert str(Path(sf.__file__).parents[1]).encode() not in (exported / name).read_bytes(), name


def test_the_config_cannot_name_code(exported: Path, tmp_path: Path) -> None:
    """A folder from elsewhere builds what is installed here, or nothing."""
    shutil.copytree(exported, tmp_path / "pipe")
    path = tmp_path / "pipe/network/config.json"
    config = json.loads(path.read_text())
    config["model"]["backbone"]["name"] = "os.system"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown backbone 'os\.system'"):
        pipeline_of(tmp_path / "pipe")


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
    net, t = sf.load(source).network, torch.tensor([511 / 512, 1.0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = pipe.network(noise, t, t, torch.tensor([0, 4]))
        assert torch.equal(got, net(noise, t, t, torch.tensor([0, 4])))
    with pytest.raises(ValueError, match=r"float32, not torch\.bfloat16"):
        pipe.to(torch.bfloat16)(1)


def test_latents_with_their_autoencoder(tmp_path: Path) -> None:
    vae = autoencoder_in(tmp_path / "vae")
    source = model_in(tmp_path / "model", shape=(4, 4, 4), vae="some/vae")
    with pytest.raises(ValueError, match="latents of 4 channels"):
        export_model(model_in(tmp_path / "pixels"), tmp_path / "no", "diffusers", decoder=str(vae))
    export_model(source, tmp_path / "pipe", "diffusers", decoder=str(vae))
    noise = noise_for(2, 4, 4, 4)
    want = load_autoencoder(vae).decode(sf.load(source).sample(noise, 1, steps=2)) / 2 + 0.5
    assert json.loads((tmp_path / "pipe/model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    assert largest(pipeline_of(tmp_path / "pipe")(1, 2, latents=noise, output_type="pt").images, want) < 1e-4
    alone = pipeline_of(tmp_path / "pipe", vae=None)
    assert alone(1).images.shape == (1, 4, 4, 4), "latents, as they are no pictures"
    with pytest.raises(ValueError, match="latents of some/vae"):
        alone(1, output_type="pil")


def test_what_gives_other_samples_is_thrown_away(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> None:
        write(*arguments)
        file = tmp_path.glob(".*/pipe/network/*.safetensors")
        (path,) = file
        tensors = load_file(path)
        tensors["network.patch_embedding.weight"][0, 0] += 0.05
        save_file(tensors, path, metadata={"format": "pt"})

    from shortcutflow.interop import diffusers_pipeline

    write = diffusers_pipeline.write_pipeline
    monkeypatch.setattr(diffusers_pipeline, "write_pipeline", wrong)
    with pytest.raises(ValueError, match="gives other samples than the library's sampler"):
        export_model(source, tmp_path / "pipe", "diffusers")
    assert not list(tmp_path.iterdir())


def test_existing_folders_stay(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists already, and holds notes\.txt"):
        export_model(source, tmp_path / "pipe", "diffusers")
    assert (tmp_path / "pipe/notes.txt").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_model(source, tmp_path / "none/pipe", "diffusers")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"shortcutflow\[latents\]"):
        export_model(source, tmp_path / "other", "diffusers")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"dit"}))
def test_families(family: str, tmp_path: Path) -> None:
    """Every family, as images and as sequences conditioned on tensors or on nothing."""
    cases = {
        "image": {"num_classes": None, "null_y": None},
        "sequence": {"shape": (6, 4), "num_classes": None, "null_y": 0, "condition_shape": (3,)},
    }
    if family == "diffusers_unet":
        del cases["sequence"]  # it makes images only
    for name, changes in cases.items():
        source = model_in(tmp_path / f"{name}-model", family, **changes)
        export_model(source, tmp_path / name, "diffusers")
        model = sf.load(source)
        noise = noise_for(5, *model.shape)
        given = {} if name == "image" else {"condition": noise_for(5, 3)}
        got = pipeline_of(tmp_path / name)(num_inference_steps=3, latents=noise, output_type="latent", **given).images
        assert largest(got, model.sample(noise, given.get("condition"), steps=3)) < 1e-4
