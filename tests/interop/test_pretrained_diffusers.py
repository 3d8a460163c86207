"""Folders of diffusers: its own networks and schedulers, saved by itself, converted and compared."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import backbones
import shortcutflow as sf
from shortcutflow.cli import main
from shortcutflow.interop.convert import convert
from tests.interop.public_layouts import Schedule, randomise

diffusers = pytest.importorskip("diffusers")

TIMES = (0.25, 0.9, 0.0, 0.003, 1 / 128, 0.5, 0.98, 127 / 128, 1.0)
CLASSES = 5
ATTENDING = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    # As those of DDPM's authors: sines first, frequencies that end at 1/10000, padding by hand.
    "ddpm": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6,
             "attention_head_dim": None},
    "labels": {"num_class_embeds": CLASSES},
    "variance": {"out_channels": 6},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "center_input_sample": True, "dropout": 0.1,
                        "downsample_type": "resnet", "upsample_type": "resnet", "time_embedding_dim": 48},
}  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "noise": {},
    "v": {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_end": 0.012},
    "data": {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    "given": {"trained_betas": [0.002 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these are slower with more, many times so beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unet(**options: Any) -> Any:
    network = diffusers.UNet2DModel(**{
        "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
        "attention_head_dim": 8, **ATTENDING, **options,
    })  # fmt: skip
    randomise(network, seed=0)
    return network.eval()


def dit(**options: Any) -> Any:
    network = diffusers.DiTTransformer2DModel(**{
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "num_embeds_ada_norm": CLASSES, **options,
    })  # fmt: skip
    randomise(network, seed=0)
    first, *others = network.transformer_blocks
    for block in others:  # as in the weights of the paper: one embedding, a copy in each block
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return network.eval()


def pipeline(folder: Path, network: Any, scheduler: Any = None, part: str = "transformer") -> Path:
    """A pipeline's folder as diffusers lays it out."""
    network.save_pretrained(folder / part)
    (scheduler or diffusers.DDIMScheduler()).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    return folder


def inputs(shape: tuple[int, ...], labels: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, t and labels of a batch, a row a time."""
    x = torch.randn(len(TIMES), *shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor(TIMES), torch.arange(len(TIMES)) % CLASSES if labels else None


def original_of(network: Any, channels: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda z, i, y: network(z, i, class_labels=y).sample[:, :channels]


def assert_same(model: sf.Model, network: Any, scheduler: Any, labels: bool) -> None:
    """The model's velocities are those of the original's predictions, at every step size."""
    x, t, y = inputs(model.shape, labels)
    schedule = Schedule(scheduler.betas.double().numpy())
    predicts = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}[scheduler.config.prediction_type]
    original = original_of(network, model.shape[0])
    got = model.network(x, t, torch.zeros_like(t), y)
    for k, time in enumerate(TIMES):
        one = slice(k, k + 1)
        expected = schedule.velocity(lambda z, i, one=one: original(z, i, None if y is None else y[one]),
                                     x[one], time, predicts)  # fmt: skip
        # The float32 betas of diffusers are the schedule of this test, and 1e-7 beside the model's.
        assert (got[one] - expected).abs().max() < 3e-5 * max(1.0, float(expected.abs().max())), time
        assert expected.std() > 0.1
    for d in (1 / 128, 1.0):
        assert torch.equal(model.network(x, t, torch.full_like(t, d), y), got), "the step size has no effect"


@pytest.mark.parametrize("options", UNETS)
@torch.no_grad()
def test_unets(options: str, tmp_path: Path) -> None:
    """Saved beside its scheduler's config, in one folder, as the first models of DDPM are."""
    network, scheduler = unet(**UNETS[options]), diffusers.DDPMScheduler()
    network.save_pretrained(tmp_path / "net")
    scheduler.save_pretrained(tmp_path / "net")
    config, notes = convert(tmp_path / "net", tmp_path / "out")
    assert (config.backbone.name, config.shape, config.vae) == ("diffusers_unet", (3, 8, 8), None)
    assert any("the mean of its rows" in note for note in notes) == (options == "labels")
    model = sf.load(tmp_path / "out")
    assert_same(model, network, scheduler, labels=options == "labels")
    if options == "labels":
        assert (config.num_classes, config.null_y) == (CLASSES, CLASSES)
        table = model.network.get_parameter("condition.label.weight")
        assert torch.allclose(table[CLASSES], table[:CLASSES].mean(0), atol=1e-6)
        assert model.sample(2, y=3, steps=2, guidance_scale=1.5).isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["dit", "unet"])
@torch.no_grad()
def test_schedules_and_predictions(kind: str, schedule: str, tmp_path: Path) -> None:
    network = dit() if kind == "dit" else unet()
    scheduler = diffusers.DDIMScheduler(**SCHEDULES[schedule])
    convert(pipeline(tmp_path / "pipe", network, scheduler, "unet"), tmp_path / "out")
    assert_same(sf.load(tmp_path / "out"), network, scheduler, labels=kind == "dit")


@pytest.mark.parametrize("size", [8, 32, 64])
@torch.no_grad()
def test_dits(size: int, tmp_path: Path) -> None:
    """256 pixels are 32x32 latents, 512 pixels 64x64."""
    network = dit(sample_size=size, num_layers=2 if size == 8 else 1)
    config, _ = convert(pipeline(tmp_path / "pipe", network), tmp_path / "out")
    assert (config.backbone.name, config.shape, config.num_classes, config.null_y) == ("dit", (4, size, size), 5, 5)
    model, original = sf.load(tmp_path / "out"), original_of(network, 4)
    x, t, y = (part[:2] for part in inputs(model.shape, labels=True))
    got = model.network(x, t, t, y)
    schedule = Schedule()
    for k in range(2):
        expected = schedule.velocity(lambda z, i, k=k: original(z, i, y[k : k + 1]), x[k : k + 1], float(t[k]))
        assert (got[k] - expected).abs().max() < 3e-5
    null = torch.full((2,), CLASSES)
    assert torch.equal(model.network(x, t, t), model.network(x, t, t, null))


@torch.no_grad()
def test_ddim_is_eulers_method(tmp_path: Path) -> None:
    """diffusers' scheduler from time to time, and steps along the velocity between the same times."""
    network, scheduler = unet(), diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    convert(pipeline(tmp_path / "pipe", network, scheduler, "unet"), tmp_path / "out")
    model, schedule = sf.load(tmp_path / "out"), Schedule()
    scheduler.set_timesteps(10)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    times = [float(schedule.t[int(i)]) for i in scheduler.timesteps]
    x = z * math.hypot(times[0], 1 - times[0])
    for i, (t, end) in zip(scheduler.timesteps, itertools.pairwise([*times, 1.0]), strict=True):
        z = scheduler.step(network(z, i).sample, i, z).prev_sample
        x = x + (end - t) * model.network(x, torch.full((2,), t), torch.zeros(2))
        assert (x - z * math.hypot(end, 1 - end)).abs().max() < 1e-4 * z.abs().max()


def test_a_converted_unet_is_trained_as_any_network(tmp_path: Path) -> None:
    """Gradients, also through checkpoints; units, compiled blocks, operations counted; the step size let in."""
    network = unet()
    convert(pipeline(tmp_path / "pipe", network, part="unet"), tmp_path / "out")
    net: Any = sf.load(tmp_path / "out").network
    (x, t, _), gradients = inputs((3, 8, 8), labels=False), []
    for checkpoints in (False, True):
        net.gradient_checkpointing = checkpoints
        net.zero_grad()
        net(x, t, t).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert gradients[0]["condition.step.out.weight"].any()
    assert len(net.shard_plan()) == 5
    assert net.flops() > 1e6
    with torch.no_grad():
        net.condition.step.out.weight.normal_(std=0.1)
        eager = net(x, t, t)
        assert not torch.allclose(eager, net(x, t, t / 2), atol=1e-3)
        net.compile_blocks(backend="aot_eager")
        assert (net(x, t, t) - eager).abs().max() < 1e-4 * eager.abs().max()
    torch._dynamo.reset()


@torch.no_grad()
def test_old_files(tmp_path: Path) -> None:
    """Weights in a .bin, with attention's names of 2022, and a DiT by its first name with its positions."""
    network = unet(attention_head_dim=None)
    network.save_pretrained(tmp_path / "net", safe_serialization=False)
    file = tmp_path / "net" / "diffusion_pytorch_model.bin"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = torch.load(file, weights_only=True)
    for new, before in old.items():
        state = {name.replace(new, before): tensor for name, tensor in state.items()}
    assert any(".proj_attn." in name for name in state)
    torch.save(state, file)
    _, notes = convert(tmp_path / "net", tmp_path / "out")
    assert any("there is no scheduler_config.json" in note for note in notes)
    assert_same(sf.load(tmp_path / "out"), network, diffusers.DDPMScheduler(), labels=False)

    folder = pipeline(tmp_path / "pipe", dit())
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    original = dit()
    state = original.state_dict() | {"pos_embed.pos_embed": original.pos_embed.pos_embed}
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()
    convert(folder, tmp_path / "dit")
    assert_same(sf.load(tmp_path / "dit"), original, diffusers.DDIMScheduler(), labels=True)


def test_the_autoencoder_of_a_pipeline(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe", dit(num_layers=1))
    assert convert(folder, tmp_path / "one")[0].vae == "stabilityai/sd-vae-ft-mse"
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    assert convert(folder, tmp_path / "two")[0].vae == str(folder / "vae")
    assert convert(folder / "transformer", tmp_path / "three")[0].shape == (4, 8, 8)


@torch.no_grad()
def test_folders_as_people_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards with an index, a variant, both; a training script's checkpoint; the hub's cache; a hub id."""
    network, (x, t, y) = dit(num_layers=1), inputs((4, 8, 8), labels=True)
    half = dit(num_layers=1).half()

    def velocities(source: Path, weights: str | None = None) -> tuple[Tensor, tuple[str, ...]]:
        out = tmp_path / f"out of {source.name} {weights}"
        _, notes = convert(source, out)
        return sf.load(out, weights=weights).network(x, t, t, y), notes

    network.save_pretrained(tmp_path / "plain")
    expected, _ = velocities(tmp_path / "plain")
    network.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(velocities(tmp_path / "sharded")[0], expected)
    for name, options in {"half": {}, "half sharded": {"max_shard_size": "20KB"}}.items():
        half.save_pretrained(tmp_path / name, variant="fp16", **options)
        got, notes = velocities(tmp_path / name)
        assert 0 < (got - expected).abs().max() < 0.5
        assert any("of the variant fp16" in note for note in notes)
    half.save_pretrained(tmp_path / "plain", variant="fp16")
    assert torch.equal(velocities(tmp_path / "plain", "current")[0], expected), "full precision is preferred"

    average = dit(num_layers=1)
    average.proj_out_2.bias.add_(1)
    saved = tmp_path / "checkpoint-500"
    network.save_pretrained(saved / "transformer")
    average.save_pretrained(saved / "transformer_ema")
    torch.save({}, saved / "optimizer.bin")
    assert torch.equal(velocities(saved, "current")[0], expected)
    assert not torch.equal(velocities(saved)[0], expected), "its average is what is loaded by default"
    (tmp_path / "plain" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert "give the folder" in refusal(tmp_path / "plain" / "model.safetensors", tmp_path / "none")

    root = tmp_path / "models--a--b"
    (root / "snapshots").mkdir(parents=True)
    (tmp_path / "plain").rename(root / "snapshots" / "abc")
    assert torch.equal(velocities(root)[0], expected)
    (root / "snapshots" / "older").mkdir()
    assert "holds 2 snapshots and no main" in refusal(root, tmp_path / "none")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc\n")
    assert torch.equal(velocities(root, "current")[0], expected)

    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(root / "snapshots" / "abc"))
    assert torch.equal(velocities(Path("a/b"))[0], expected)

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "the hub has none of that name: offline" in refusal(Path("a/b"), tmp_path / "none")


def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for mistyped in ("nowhere/net.pt", "models/typo", "nothing"):
        with pytest.raises(SystemExit):
            main(["convert", mistyped, "--out", str(tmp_path / "none")])
        assert f"there is no file or folder {mistyped}; a hub id is" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="there is no run at models/typo"):
        sf.load("models/typo")


def test_an_index_that_lies(tmp_path: Path) -> None:
    dit(num_layers=1).save_pretrained(tmp_path / "net", max_shard_size="50KB")
    index = tmp_path / "net" / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    for placed, message in (
        ({"a": "../elsewhere.safetensors"}, "'../elsewhere.safetensors', which is not beside it"),
        (whole | {"more": next(iter(whole.values()))}, "its files lack more"),
        (whole | {"more": "none.safetensors"}, "there is no file"),
        ([], "must hold a weight_map"),
    ):
        edit(index, weight_map=placed)
        assert message in refusal(tmp_path / "net", tmp_path / "out")


# ---- what is refused


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another network": ("unet", {"_class_name": "UNet2DConditionModel"}, "holds a 'UNet2DConditionModel'; known:"),
    "variance exploding": ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' is not supp"),
    "other blocks": ("unet", {"down_block_types": ["SkipDownBlock2D"] * 2}, "got 'SkipDownBlock2D'"),
    "unknown option": ("unet", {"cross_attention_dim": 8}, "unet has no option 'cross_attention_dim' here"),
    "too deep": ("unet", {"layers_per_block": 10**9}, "at most 64 layers"),
    "other widths": ("unet", {"block_out_channels": [16, 64]}, "; the others make it"),
    "no size": ("unet", {"sample_size": None}, "give the side of its samples with --image-size"),
    "a size of words": ("unet", {"sample_size": "large"}, "'large' is no size of an image"),
    "odd size": ("unet", {"sample_size": 9}, "multiples of 2"),
    "channels of words": ("unet", {"in_channels": []}, "int"),
    "exact GELU": ("dit", {"activation_fn": "gelu"}, "activation_fn 'gelu' is not supported"),
    "other norm": ("dit", {"norm_type": "ada_norm_single"}, "norm_type 'ada_norm_single' is not supported"),
    "outputs": ("dit", {"out_channels": 5}, "out_channels 5 must be in_channels 4, or twice that"),
    "heads": ("dit", {"num_attention_heads": 3}, "; the others make it"),
}
SCHEDULERS: dict[str, tuple[dict[str, Any], str]] = {
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "'FlowMatchEulerDiscreteScheduler' is not supported"),
    "prediction": ({"prediction_type": "flow"}, "unknown prediction_type 'flow'; known: epsilon"),
    "schedule": ({"beta_schedule": "laplace"}, "schedule must be one of"),
    "steps": ({"num_train_timesteps": "many"}, "not supported between instances"),
    "betas": ({"trained_betas": [0.5, 2]}, "betas must be at least two numbers"),
}


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        convert(source, out, **options)
    assert len(str(raised.value).splitlines()) == 1
    assert not out.exists()
    return str(raised.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(name: str, tmp_path: Path) -> None:
    kind, changes, message = CONFIGS[name]
    pipeline(tmp_path / "pipe", dit(num_layers=1) if kind == "dit" else unet(), part="unet")
    edit(tmp_path / "pipe" / "unet" / "config.json", **changes)
    assert message in refusal(tmp_path / "pipe", tmp_path / "out")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = SCHEDULERS[name]
    pipeline(tmp_path / "pipe", dit(num_layers=1))
    edit(tmp_path / "pipe" / "scheduler" / "scheduler_config.json", **changes)
    assert message in refusal(tmp_path / "pipe", tmp_path / "out")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", pipeline(tmp_path / "pipe", dit(num_layers=2))
    assert "kind and heads are for files" in refusal(folder, out, kind="dit")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for kept in (0, 4, 1000, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        assert "no safetensors file, or damaged" in refusal(folder, out)
    with torch.no_grad():
        apart = dit()
        apart.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    apart.save_pretrained(folder / "transformer")
    assert "block 1 has an embedding of its own" in refusal(folder, out)
    weights.unlink()
    assert "has no weights" in refusal(folder, out)
    (folder / "transformer" / "config.json").write_text("[" * 10_000)
    assert "is not JSON" in refusal(folder, out)
    (folder / "transformer" / "config.json").unlink()
    assert "a pipeline without one network" in refusal(folder, out)
    (tmp_path / "empty").mkdir()
    assert "is no folder of a diffusers network or pipeline" in refusal(tmp_path / "empty", out)
    (tmp_path / "empty" / "model.pt").touch()
    assert "it holds model.pt: give the file" in refusal(tmp_path / "empty", out)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'shortcutflow\[latents\]'"):
        backbones.create("diffusers_unet", shape=(3, 8, 8))


def test_the_test_sees_another_schedule() -> None:
    """Betas that are a thousandth larger change velocities by more than is allowed."""
    one, other = Schedule(), Schedule(np.linspace(1e-4, 0.02, 1000) * 1.001)
    x = torch.ones(1, 3, 8, 8)
    network = original_of(unet(), 3)
    with torch.no_grad():
        off = one.velocity(lambda z, i: network(z, i, None), x, 0.25) - other.velocity(
            lambda z, i: network(z, i, None), x, 0.25
        )
    assert off.abs().max() > 1e-4
