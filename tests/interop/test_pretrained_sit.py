"""SiT's checkpoints: the velocity of the original network, its samples, and a step size that can be learnt."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shortcutflow as sf
from shortcutflow.interop.convert import convert
from shortcutflow.interop.torch_file import is_torch_file
from tests.interop.public_layouts import PublicTransformer, saved

TIMES = (0.5, 0.0, 1.0, 1e-3, 0.25, 0.75, 127 / 128)
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "no variance": {"doubled": False},
    "pixels, patch 4": {"size": 16, "patch": 4, "channels": 3, "heads": 4},
    "patch 8": {"size": 32, "patch": 8},
    "256 pixels": {"size": 32, "depth": 1},
    "512 pixels": {"size": 64, "depth": 1},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these are slower with more, many times so beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(network: PublicTransformer, batch: int = 3) -> tuple[Tensor, Tensor]:
    """x_t, and labels of which the last is none."""
    size = int(network.pos_embed.shape[1] ** 0.5) * network.patch
    x = torch.randn(batch, network.channels, size, size, generator=torch.Generator().manual_seed(1))
    null = network.y_embedder.embedding_table.num_embeddings - 1
    return x, torch.tensor([1, 3, null]).repeat(batch)[:batch]


def opened(network: PublicTransformer, folder: Path, **options: Any) -> sf.Model:
    """The network, saved, converted and loaded."""
    options = {"kind": "sit", "heads": network.blocks[0].attn.heads} | options
    convert(saved(network, folder / "net.pt"), folder / "out", **options)
    return sf.load(folder / "out")


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_velocities_are_those_of_the_original(size: str, tmp_path: Path) -> None:
    original = PublicTransformer(**SIZES[size])
    t = torch.tensor(TIMES if SIZES[size].get("size", 8) < 32 else TIMES[:1])
    model, (x, y) = opened(original, tmp_path), inputs(original, len(t))
    assert model.shape == x.shape[1:]
    expected, got = original(x, t, y), model.network(x, t, torch.zeros_like(t), y)
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < 1e-5
    for d in (1 / 128, 1.0):
        assert torch.equal(model.network(x, t, torch.full_like(t, d), y), got), "the step size has no effect"


@torch.no_grad()
def test_what_would_be_wrong_is_seen(tmp_path: Path) -> None:
    """Another kind, heads, label, time and order of channels: the comparison above is not blind to any."""
    original = PublicTransformer(heads=2)
    (x, y), t = inputs(original), torch.full((3,), 0.25)
    expected = original(x, t, y)
    model = opened(original, tmp_path)
    wrong = {
        "label": model.network(x, t, t, y.flip(0)),
        "time": model.network(x, 1 - t, t, y),
        "channels": model.network(x.flip(1), t, t, y).flip(1),
        "transposed": model.network(x.mT, t, t, y).mT,
    }
    for name, options in {"heads": {"heads": 4}, "kind": {"kind": "dit"}}.items():
        convert(tmp_path / "net.pt", tmp_path / name, **({"kind": "sit", "heads": 2} | options))
        wrong[name] = sf.load(tmp_path / name).network(x, t, t, y)
    for name, got in wrong.items():
        assert (got - expected).abs().max() > 1e-2, name


@pytest.mark.parametrize("steps", [1, 8])
@torch.no_grad()
def test_samples_are_those_of_its_own_sampler(steps: int, tmp_path: Path) -> None:
    """Its ODE by Euler's method, from t = 0 to 1."""
    original = PublicTransformer()
    model, (noise, y) = opened(original, tmp_path), inputs(original)
    x = noise
    for i in range(steps):
        x = x + original(x, torch.full((3,), i / steps), y) / steps
    assert (model.sample(noise, y, steps=steps) - x).abs().max() < 1e-5
    assert (model.sample(noise, y, steps=steps) - noise).abs().max() > 0.1
    null = torch.full_like(y, model.num_classes)
    guided = sf.sample(lambda x, t, d, y: original(x, t, y), noise, y, steps=steps, guidance_scale=1.5, null_y=null[0])
    assert (model.sample(noise, y, steps=steps, guidance_scale=1.5) - guided).abs().max() < 1e-4


def test_the_step_size_can_be_learnt(tmp_path: Path) -> None:
    original = PublicTransformer()
    model, (x, y) = opened(original, tmp_path), inputs(original)
    t, d = torch.tensor([0.0, 0.25, 0.5]), torch.tensor([1.0, 0.25, 1 / 128])
    before = model.network(x, t, d, y).detach()
    optimizer = torch.optim.SGD(model.network.parameters(), lr=0.05)
    for step in range(2):
        (model.network(x, t, d, y) - torch.ones_like(x)).square().mean().backward()
        grads = {name: p.grad for name, p in model.network.named_parameters() if name.startswith("condition.step.")}
        assert len(grads) == 4
        assert grads["condition.step.out.weight"].any(), "at once"
        if step:
            assert all(grad.any() for grad in grads.values()), "all of it, from the second step on"
        optimizer.step()
        optimizer.zero_grad()
    after = model.network(x, t, d, y)
    assert not torch.allclose(after, before)
    assert not torch.allclose(after, model.network(x, t, d.flip(0), y), atol=1e-6), "steps of other sizes differ now"


def test_what_the_folder_says(tmp_path: Path) -> None:
    config, notes = convert(saved(PublicTransformer(), tmp_path / "SiT-S-2.pt"), tmp_path / "a" / "out")
    assert sf.load(tmp_path / "a" / "out").config == config
    assert (config.shape, config.num_classes, config.null_y) == ((4, 8, 8), 5, 5)
    assert config.flow_only
    assert config.vae == "stabilityai/sd-vae-ft-mse"
    assert "0.18215" in config.about["latents"]
    assert "diffusion" not in config.backbone.options
    assert any("heads: 2" in note for note in notes)
    pixels = saved(PublicTransformer(channels=3), tmp_path / "sit.pt")
    assert convert(pixels, tmp_path / "pixels").config.vae is None


@torch.no_grad()
def test_training_checkpoints_and_their_averages(tmp_path: Path) -> None:
    """Nested, with an optimizer and arguments beside, of DDP, in bfloat16; both sets of weights are kept."""
    current, average = PublicTransformer(seed=0), PublicTransformer(seed=1)
    file = tmp_path / "0050000.pt"
    ema = {f"module.{name}": tensor for name, tensor in average.state_dict().items()}
    optimizer = torch.optim.AdamW(current.parameters())
    saved(current, file, ema=ema, opt=optimizer.state_dict(), args=argparse.Namespace(model="SiT-XL/2", lr=1e-4))
    convert(file, tmp_path / "out", kind="sit", heads=2)
    x, y = inputs(current)
    t = torch.full((3,), 0.5)
    for name, original in {None: average, "ema": average, "current": current}.items():
        got = sf.load(tmp_path / "out", weights=name).network(x, t, t, y)
        assert (got - original(x, t, y)).abs().max() < 1e-5
    saved(current.bfloat16(), tmp_path / "half.pt")
    convert(tmp_path / "half.pt", tmp_path / "half", kind="sit", heads=2)
    expected = current.float()(x, t, y)
    # Positions are computed anew, in float32.
    assert (sf.load(tmp_path / "half").network(x, t, t, y) - expected).abs().max() < 0.05


def test_safetensors_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    original = PublicTransformer()
    save_file(original.state_dict(), tmp_path / "sit.safetensors")
    convert(tmp_path / "sit.safetensors", tmp_path / "out", heads=2)
    x, y = inputs(original)
    t = torch.full((3,), 0.5)
    assert (sf.load(tmp_path / "out").network(x, t, t, y) - original(x, t, y)).abs().max() < 1e-5


@pytest.mark.parametrize("layout", [
    {"model_state_dict": {}, "ema_state_dict": None}, {"state_dict_ema": None, "net": {}}, {"ema": {"shadow": None}},
    {"state_dict": None, "epoch": 3}, {"model": {"state_dict": None}},
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "model.net.", ""])
def test_names_of_other_training_scripts(layout: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    """None stands for the weights; sets that are empty stay so and are refused, so they are filled too."""
    state = {prefix + name: tensor for name, tensor in PublicTransformer().state_dict().items()}

    def filled(value: Any) -> Any:
        if value is None or value == {}:
            return state
        return {key: filled(part) for key, part in value.items()} if isinstance(value, dict) else value

    torch.save(filled(layout), tmp_path / "net.pt")
    config, _ = convert(tmp_path / "net.pt", tmp_path / "out", kind="sit", heads=2)
    average = any("ema" in key for key in layout)
    assert config.default_weights == ("ema" if average else "current")
    assert len(config.weights) == (2 if average and len(layout) == 2 else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_that_were_rounded_before(dtype: torch.dtype, tmp_path: Path) -> None:
    """A float32 file of a network that was held in half precision; a table that was learnt is refused as before."""
    state = {name: tensor.to(dtype).float() for name, tensor in PublicTransformer().state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    convert(tmp_path / "net.pt", tmp_path / "out", kind="sit", heads=2)
    torch.save(state | {"pos_embed": state["pos_embed"] + 1e-3}, tmp_path / "net.pt")
    assert "not the fixed sine-cosine table" in refusal(tmp_path / "net.pt", tmp_path / "again", heads=2)


# ---- what is refused


def refusal(source: Path, out: Path, **options: Any) -> str:
    """The one line that a source is refused with; nothing is left behind."""
    before = sorted(source.parent.iterdir()) if source.parent.is_dir() else []
    with pytest.raises((ValueError, OSError)) as raised:
        convert(source, out, **({"kind": "sit"} | options))
    assert len(str(raised.value).splitlines()) == 1
    assert 20 < len(str(raised.value)) < 600
    assert (sorted(source.parent.iterdir()) if source.parent.is_dir() else []) == before
    return str(raised.value)


def changed(**tensors: Tensor | None) -> dict[str, Any]:
    """A state dict with some tensors replaced or, with None, left out; dots are written as double underscores."""
    state = PublicTransformer().state_dict() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


WRONG: dict[str, tuple[Any, str]] = {
    "a parameter is missing": (changed(blocks__1__attn__proj__bias=None), "missing blocks.1.attn.proj.bias"),
    "no patches": (changed(x_embedder__proj__weight=None), "x_embedder.proj.weight is missing"),
    "no positions": (changed(pos_embed=None), "pos_embed is missing"),
    "one too many": (changed(blocks__0__attn__q_norm__weight=torch.ones(16)), "unknown blocks.0.attn.q_norm.weight"),
    "a block apart": (changed(blocks__7__mlp__fc1__bias=torch.ones(128)), "unknown blocks.7.mlp.fc1.bias"),
    "another shape": (changed(blocks__1__mlp__fc2__weight=torch.ones(32, 64)), "; the others make it (32, 128)"),
    "another width": (changed(t_embedder__mlp__2__weight=torch.ones(16, 16)), "t_embedder.mlp.2.weight has shape"),
    "outputs": (changed(final_layer__linear__weight=torch.ones(48, 32)), "48 rows; the patches make it 16, or 32"),
    "positions that were learnt": (changed(pos_embed=torch.zeros(1, 16, 32)), "not the fixed sine-cosine table"),
    "no square": (changed(pos_embed=torch.zeros(1, 15, 32)), "impossible sizes"),
    "whole numbers": (changed(pos_embed=torch.zeros(1, 16, 32).long()), "must hold plain floating-point numbers"),
    "not finite": (changed(blocks__0__mlp__fc1__bias=torch.full((128,), torch.nan)), "not finite"),
    "larger than the file": (changed(x_embedder__proj__bias=torch.ones(1).expand(10**12)), "its tensors claim"),
    "no tensors": ({"weights": [1, 2]}, "'weights' is a list"),
    "nothing": ({}, "x_embedder.proj.weight is missing"),
    "a tensor alone": (torch.ones(3), "holds a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_contents_are_named(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    torch.save(content, tmp_path / "net.pt")
    assert message in refusal(tmp_path / "net.pt", tmp_path / "out", heads=2)


class Hostile:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch canary",)


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": changed(), "args": Hostile()}, tmp_path / "net.pt")
    assert "it names 'posix.system'" in refusal(tmp_path / "net.pt", tmp_path / "out")
    torch.load(tmp_path / "net.pt", weights_only=False)
    assert (tmp_path / "canary").exists(), "it would have run"


def test_files_that_are_no_state_dict(tmp_path: Path) -> None:
    """The format before torch 1.6, programs, and a network that was saved whole: each with its true reason."""
    file, network = tmp_path / "net.pt", PublicTransformer()
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=False)
    assert is_torch_file(file)
    assert "format from before version 1.6" in refusal(file, tmp_path / "out")
    torch.save(network, file)
    assert "PublicTransformer'" in (said := refusal(file, tmp_path / "out"))
    assert "saved whole, save its state_dict()" in said
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(file))
    assert "a program of torch.jit" in refusal(file, tmp_path / "out")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "net.pt2")
    assert "a program of torch.export" in refusal(tmp_path / "net.pt2", tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 1, 100, 10_000, -1, -200])
def test_a_file_that_is_cut_off(kept: int, tmp_path: Path) -> None:
    whole = saved(PublicTransformer(), tmp_path / "whole.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(whole[:kept])
    assert "is cut off" in refusal(tmp_path / "net.pt", tmp_path / "out")


def test_archives_that_grow(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"\0" * 10**7)
    assert "is compressed, which torch.save never does" in refusal(tmp_path / "net.pt", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02]q\x00.")
        archive.writestr("net/version", b"3")
    assert "holds a list" in refusal(tmp_path / "other.pt", tmp_path / "out")


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    file = saved(PublicTransformer(), tmp_path / "net.pt")
    out = tmp_path / "out"
    assert "give --kind sit (predicts the velocity) or --kind dit" in refusal(file, out, kind=None)
    assert "unknown kind 'sat'" in refusal(file, out, kind="sat")
    assert "its positions are those of samples of side 8" in refusal(file, out, image_size=16)
    assert "heads must divide width" in refusal(file, out, heads=3)
    assert "must be a power of two" in refusal(file, out, finest_steps=100)
    assert "there is no file" in refusal(tmp_path / "none.pt", out)
    out.mkdir()
    (out / "something").touch()
    assert "exists already" in refusal(file, out)


def test_what_looks_like_one(tmp_path: Path) -> None:
    assert is_torch_file(saved(PublicTransformer(), tmp_path / "net.pt"))
    (tmp_path / "authors.pkl").write_bytes(b"\x80\x04\x95")
    assert not is_torch_file(tmp_path / "authors.pkl")
    assert "no file of torch.save" in refusal(tmp_path / "authors.pkl", tmp_path / "out")
    assert not is_torch_file(tmp_path / "nothing")
