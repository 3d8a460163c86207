"""Samplers with fixed steps as ONNX and .pt2 files: the library's samples, or no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortcutflow as sf
from backbones.selective_scan import scan_by_doubling, selective_scan, selective_scan_recurrence
from shortcutflow.cli import main
from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.interop import export as module
from shortcutflow.interop.export import FORMATS, export_model
from shortcutflow.interop.exportable import ExportableSampler, trace
from tests.interop.exported import FAMILIES, autoencoder_in, model_in, noise_for, without_this_library

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(file: Path, noise: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """What onnxruntime makes of a file."""
    given = {"noise": noise.numpy()} | ({} if y is None else {"y": y.numpy()})
    return torch.from_numpy(onnxruntime.InferenceSession(file).run(["samples"], given)[0])


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def one_step(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "one_step.onnx"
    assert "differs from the library's sampler by" in export_model(source, file, "onnx")
    return file


def test_one_step(source: Path, one_step: Path) -> None:
    """Any number of samples; and other samples after one weight has changed."""
    model = sf.load(source)
    for count in (1, 2, 7):
        noise, y = noise_for(count, 3, 4, 4), torch.arange(count) % 5
        assert largest(run(one_step, noise, y), model.sample(noise, y)) < 1e-4
    with torch.no_grad():
        model.network.get_parameter("patch_embedding.weight")[0, 0] += 0.05
    assert largest(run(one_step, noise, y), model.sample(noise, y)) > 1e-3


def test_what_the_file_says(one_step: Path) -> None:
    graph = onnx.load(one_step)
    onnx.checker.check_model(graph, full_check=True)
    said = {entry.key: entry.value for entry in graph.metadata_props}
    told = {name: json.loads(said[name]) for name in ("steps", "finest_steps", "shape", "num_classes", "null_label")}
    assert told == {"steps": 1, "finest_steps": 128, "shape": [3, 4, 4], "num_classes": 4, "null_label": 4}
    assert (json.loads(said["value_range"]), graph.producer_name) == ([-1, 1], "shortcutflow")
    session = onnxruntime.InferenceSession(one_step)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    assert inputs == {"noise": ("tensor(float)", ["batch", 3, 4, 4]), "y": ("tensor(int64)", ["batch"])}
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("samples", ["batch", 3, 4, 4])]
    content = one_step.read_bytes()
    for path in (sf.__file__, torch.__file__):
        assert str(Path(path).parents[1]).encode() not in content, "names of files of this machine"


@pytest.mark.slow
def test_guided_to_pictures(tmp_path: Path) -> None:
    """A step with guidance, and the autoencoder's decoder, in one ONNX file; also for very many samples."""
    source, vae, out = latents_in(tmp_path / "model"), autoencoder_in(tmp_path / "vae"), tmp_path / "x.onnx"
    export_model(source, out, "onnx", guidance_scale=1.5, decoder=str(vae))
    for count in (1, 70):
        noise, y = noise_for(count, 4, 4, 4), torch.arange(count) % 5
        want = load_autoencoder(vae).decode(sf.load(source).sample(noise, y, guidance_scale=1.5))
        assert largest(run(out, noise, y), want) < 1e-4


def latents_in(folder: Path) -> Path:
    """A model of latents."""
    return model_in(folder, shape=(4, 4, 4), vae="some/vae")


def test_program(tmp_path: Path) -> None:
    """A .pt2 file of three steps of mixed sizes, guided, to pictures; run without this library and its networks."""
    source, vae, file = latents_in(tmp_path / "model"), autoencoder_in(tmp_path / "vae"), tmp_path / "x.pt2"
    noise, y = noise_for(5, 4, 4, 4), torch.tensor([0, 1, 2, 3, 4])
    export_model(source, file, "torch", steps=3, guidance_scale=1.5, decoder=str(vae))
    save_file({"noise": noise, "y": y}, tmp_path / "given.safetensors")
    program = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
extra = {"shortcutflow.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra)
assert json.loads(extra["shortcutflow.json"])["step_sizes"] == "[0.5, 0.25, 0.25]"
given = load_file(sys.argv[2])
save_file({"samples": program.module()(given["noise"], given["y"]).contiguous()}, sys.argv[3])
"""
    out = tmp_path / "got.safetensors"
    without_this_library(program, file, tmp_path / "given.safetensors", out, cache=tmp_path)
    model, autoencoder = sf.load(source), load_autoencoder(vae)
    want = autoencoder.decode(model.sample(noise, y, steps=3, guidance_scale=1.5))
    assert want.shape == (5, 3, 8, 8)
    assert largest(load_file(out)["samples"], want) < 1e-4
    assert largest(autoencoder.decode(model.sample(noise, y, steps=3)), want) > 1e-3, "guidance must matter"
    assert str(Path(sf.__file__).parents[1]).encode() not in file.read_bytes()


def test_what_gives_other_samples_is_thrown_away(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_network(self: ExportableSampler, noise: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            self.network.get_parameter("patch_embedding.weight")[0, 0] += 0.05
        return expected(self, noise, y)

    expected = ExportableSampler.expected
    monkeypatch.setattr(ExportableSampler, "expected", of_another_network)
    with pytest.raises(ValueError, match="gives other samples than the library's sampler"):
        export_model(source, tmp_path / "x.pt2", "torch")
    assert not list(tmp_path.iterdir())


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "steps": ({}, {"steps": 0}, "at least 1"),
    "sizes": ({}, {"steps": [0.5, 0.4]}, "add up to 1"),
    "weights": ({}, {"weights": "ema"}, "no weights 'ema'"),
    "guidance of nothing": ({"num_classes": None, "null_y": None}, {"guidance_scale": 2.0}, "needs a model with cond"),
    "guidance without null": ({"null_y": None}, {"guidance_scale": 2.0}, "needs a model with cond"),
    "consistency": ({"sampler": "consistency"}, {"steps": 2}, "adds noise between its steps"),
}


@pytest.mark.parametrize(("changes", "options", "says"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_model_cannot_do(changes: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = model_in(tmp_path / "model", **changes)
    for kind, name in (("onnx", "x.onnx"), ("torch", "x.pt2")):
        with pytest.raises(ValueError, match=says):
            export_model(source, tmp_path / name, kind, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_that_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must end in \.onnx"):
        export_model(source, tmp_path / "x.bin", "onnx")
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_model(source, tmp_path / "x.onnx", "torch")
    (tmp_path / "x.onnx").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_model(source, tmp_path / "x.onnx", "onnx")
    assert (tmp_path / "x.onnx").read_bytes() == b"mine"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript: pip install 'shortcutflow\[onnx\]'"):
        export_model(source, tmp_path / "y.onnx", "onnx")


def test_formats(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(FORMATS) == {"diffusers", "onnx", "torch"}
    with pytest.raises(ValueError, match="unknown format 'onnyx'; known: diffusers, onnx, torch"):
        export_model(source, tmp_path / "x", "onnyx")
    with pytest.raises(ValueError, match="'diffusers' has no option steps; its options: weights, decoder"):
        export_model(source, tmp_path / "x", "diffusers", steps=[4])
    given: list[Any] = []

    class Recorded(ExportableSampler):
        def __init__(self, model: sf.Model, **options: Any) -> None:
            given.append((model.weights, options["steps"], options["guidance_scale"]))
            raise ValueError("only recorded")

    monkeypatch.setattr(module, "ExportableSampler", Recorded)
    for name, kind, options in (
        ("x.pt2", "torch", {"steps": [2.0]}),
        ("x.onnx", "onnx", {"steps": [0.5, 0.5], "guidance_scale": 2.0, "weights": "current"}),
        ("x.onnx", "onnx", {}),
    ):
        with pytest.raises(ValueError, match="only recorded"):
            export_model(source, tmp_path / name, kind, **options)
    assert given == [("current", 2, 1.0), ("current", [0.5, 0.5], 2.0), ("current", 1, 1.0)]
    with pytest.raises(SystemExit):
        main(["export", str(source), "--out", str(tmp_path / "y.pt2"), "--format", "torhc"])
    assert "torhc" in capsys.readouterr().err


class Foreign(torch.nn.Module):
    """Calls an operator that only this library's installation has."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, d: torch.Tensor, y: None) -> torch.Tensor:
        weights = [torch.ones(4, 4), torch.ones(4, 4), torch.ones(4), torch.ones(4)]
        return torch.ops.backbones.recurrent_layer(x, weights, "gru", False)


class Reading(torch.nn.Module):
    """Decides by the numbers, which no graph can."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, d: torch.Tensor, y: None) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("network", "says"),
    [(Foreign, r"backbones\.recurrent_layer.*exists only where"), (Reading, "cannot be traced by torch.export")],
)
def test_networks_that_have_no_graph(network: type[torch.nn.Module], says: str) -> None:
    given = torch.zeros(1, 6, 4), torch.zeros(1), torch.zeros(1), None
    with pytest.raises(ValueError, match=says) as error:
        trace(network(), given, what="it")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 37])
def test_scan_by_doubling(tokens: int) -> None:
    """The scan that graphs have, against its definition; and with large steps, where a quotient would overflow."""
    numbers = torch.Generator().manual_seed(tokens)
    u, delta = (torch.randn(2, 6, tokens, generator=numbers, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(2, 3, tokens, generator=numbers, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(6, 3, generator=numbers, dtype=torch.float64)
    for step in (delta.abs(), 1e4 * delta.abs()):
        got = scan_by_doubling(u.mT, step.mT, A.T, B.mT, C.mT).mT
        want = selective_scan_recurrence(u, step, A, B, C)
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * float(step.max()))
        assert not torch.allclose(got, selective_scan(u.flip(-1), step, A, B, C)) or tokens == 1


@pytest.mark.parametrize("family", ["lstm", "mamba"])
def test_graphs_of_operators_of_our_own(family: str, tmp_path: Path) -> None:
    """Families that run an operator of their own elsewhere: a graph of PyTorch's, for any number of samples."""
    net = sf.load(model_in(tmp_path / "model", family)).network
    t = torch.tensor([0.0, 0.25, 0.5, 0.75])
    program = trace(net, (noise_for(1, 3, 4, 4), t[:1], t[:1], torch.tensor([0])), what=family).module()
    for count in (1, 4):
        given = noise_for(count, 3, 4, 4), t[:count], t[:count], torch.arange(count)
        with torch.no_grad():
            assert largest(program(*given), net(*given)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"dit"}))
def test_families(family: str, tmp_path: Path) -> None:
    """Every family in ONNX, as pictures without labels and as sequences conditioned on tensors."""
    cases = {
        "image": {"num_classes": None, "null_y": None},
        "sequence": {"shape": (6, 4), "num_classes": None, "null_y": 0, "condition_shape": (3,)},
    }
    if family == "diffusers_unet":
        del cases["sequence"]  # it makes images only
    for name, changes in cases.items():
        source = model_in(tmp_path / f"{name}-model", family, **changes)
        scale = 1.5 if name == "sequence" else 1.0
        export_model(source, tmp_path / f"{name}.onnx", "onnx", steps=2, guidance_scale=scale)
        model = sf.load(source)
        noise = noise_for(5, *model.shape)
        y = noise_for(5, 3) if name == "sequence" else None
        want = model.sample(noise, y, steps=2, guidance_scale=scale)
        assert largest(run(tmp_path / f"{name}.onnx", noise, y), want) < 1e-4
