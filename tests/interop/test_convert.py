"""Checkpoints of the authors' JAX code: converted, and compared with what was recorded."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shortcutflow as sf
from shortcutflow.interop.convert import convert
from shortcutflow.interop.jax_checkpoint import read_jax_checkpoint
from tests.interop.released_files import FrozenDict, checkpoint, flat, parameters, write
from tests.parity.recorded import Recording, build, from_released, to_released

SMALL = {"width": 24, "depth": 2, "patch": 2, "channels": 3, "num_classes": 5}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recorded" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("*checkpoint*.pkl"))
        metafunc.parametrize("recorded", files, ids=lambda f: f.stem)
    if "sampling" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("sampling*.npz"))
        metafunc.parametrize("sampling", files, ids=lambda f: f.stem)


def io_of(recorded: Path) -> Recording:
    return Recording.open(recorded.with_name(f"{recorded.stem}_io.npz"))


def converted(recorded: Path, out: Path) -> Path:
    """With the recorded heads and image size, which no array says."""
    config = io_of(recorded).json("config")
    convert(recorded, out, heads=config["num_heads"], image_size=config["image_size"])
    return out


@pytest.mark.parametrize(("weights", "name"), [("current", "params"), ("ema", "params_ema")])
def test_recorded_outputs(recorded: Path, weights: str, name: str, tmp_path: Path, device: torch.device) -> None:
    z = io_of(recorded)
    model = sf.load(converted(recorded, tmp_path / "out"), weights=weights, device=device)
    x, t, level, y = z.images("x"), z.tensor("t"), z.tensor("dt"), z.tensor("y").long()
    call = (x.to(device), t.to(device), torch.exp2(-level.float()).to(device), y.to(device))
    with torch.no_grad():
        out = model.network(*call).cpu()
    assert (out - z.images(f"out_{name}")).abs().max() < 1e-5
    other = {"params": "params_ema", "params_ema": "params"}[name]
    assert (out - z.images(f"out_{other}")).abs().max() > 1e-4, "the two sets of weights must differ"


def test_recorded_sizes(recorded: Path, tmp_path: Path) -> None:
    """Everything but heads and the image size is found in the arrays."""
    sizes = io_of(recorded).json("config")
    config, notes = convert(recorded, tmp_path / "out")
    options = config.backbone.options
    assert (options["width"], options["depth"]) == (sizes["hidden_size"], sizes["depth"])
    assert [note.partition(":")[0] for note in notes] == ["heads", "image size"]
    assert (options["patch"], options["mlp_ratio"]) == (sizes["patch_size"], sizes["mlp_ratio"])
    assert (config.num_classes, config.shape[0]) == (sizes["num_classes"], sizes["channels"])
    assert config.step == int(io_of(recorded).array("step"))
    assert config.default_weights == "ema"


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_of_its_weights(recorded: Path, steps: int, tmp_path: Path) -> None:
    """The model samples as the network of the recorded sizes does, with the arrays as Python's unpickler reads them."""
    z = io_of(recorded)
    model = sf.load(converted(recorded, tmp_path / "out"), weights="current")
    with recorded.open("rb") as file:
        arrays = flat(Plain(file).load()["train_state"]["params"])
    noise, y = z.images("x"), z.tensor("y").long()
    null = z.json("config")["num_classes"]
    expected = sf.sample(build(z.json("config"), arrays), noise, y, steps=steps, guidance_scale=1.5, null_y=null)
    assert torch.equal(model.sample(noise, y, steps=steps, guidance_scale=1.5), expected)


@pytest.mark.parametrize("kind", ["shortcut", "shortcut_ema"])
def test_recorded_samples(sampling: Path, kind: str, tmp_path: Path) -> None:
    """A checkpoint made of the parameters of the recorded samples gives those samples."""
    z = Recording.open(sampling)
    params, average = (nested(z.params(name)) for name in ("params", "params_ema"))
    file = write(tmp_path / "c.pkl", checkpoint(params, average))
    config = z.json("config")
    convert(file, tmp_path / "out", heads=config["num_heads"], image_size=config["image_size"])
    model = sf.load(tmp_path / "out", weights="ema" if kind.endswith("ema") else "current")
    for name in [n for n in z.arrays if n.startswith(f"{kind}/") and n.endswith("/x")]:
        steps, scale = (float(part.lstrip("stepcfg")) for part in name.split("/")[1].split("_"))
        if steps > 32:  # takes as long as all others together
            continue
        x = model.sample(z.images("x0"), z.tensor("labels").long(), steps=int(steps), guidance_scale=scale)
        assert (x - z.images(name)).abs().max() < 1e-4, name


def nested(params: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in params.items():
        *path, last = name.split("/")
        here = tree
        for key in path:
            here = here.setdefault(key, {})
        here[last] = array
    return tree


def test_check_arrays(recorded: Path) -> None:
    """The arrays recorded by themselves, and all of them as Python's own unpickler reads them."""
    _, sets = read_jax_checkpoint(recorded)
    z = io_of(recorded)
    names = [name for name in z.arrays if name.startswith("check/params/")]
    assert names
    for name in names:
        assert np.array_equal(sets["current"](name.removeprefix("check/params/")).numpy(), z.array(name))
    with recorded.open("rb") as file:
        state = Plain(file).load()["train_state"]
    for key, read in (("params", sets["current"]), ("params_ema", sets["ema"])):
        assert all(np.array_equal(read(name).numpy(), array) for name, array in flat(state[key]).items())


class Plain(pickle.Unpickler):
    """Python's unpickler, with tuples for optax's classes."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("optax."):
            return type(name, (tuple,), {"__new__": lambda cls, *values: tuple.__new__(cls, values)})
        return super().find_class(module, name)


STYLES = {
    "numpy 1": {"numpy": 1},
    "numpy 2": {"numpy": 2},
    "numpy 2, protocol 5": {"numpy": 2, "protocol": 5},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["dict", "FrozenDict"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_styles(style: dict[str, Any], frozen: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    params, average = parameters(rng, **SMALL), parameters(rng, **SMALL)
    # An array whose first axis runs fastest, as transposed ones do.
    params["FinalLayer_0"]["Dense_0"]["kernel"] = np.asfortranarray(params["FinalLayer_0"]["Dense_0"]["kernel"])
    whole = checkpoint(*(FrozenDict(tree) if frozen else tree for tree in (params, average)))
    convert(write(tmp_path / "c.pkl", whole, **style), tmp_path / "out", heads=3, image_size=8)
    for weights, tree in (("current", params), ("ema", average)):
        state = sf.load(tmp_path / "out", weights=weights).network.state_dict()
        again = to_released(state, patch=2)
        assert again.keys() == flat(tree).keys()
        for name, array in flat(tree).items():
            assert np.array_equal(again[name], array), name


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 16, "depth": 1, "patch": 1, "channels": 1, "num_classes": 1},
        {"width": 40, "depth": 3, "patch": 4, "channels": 3, "num_classes": 7, "mlp_ratio": 2},
        {"width": 384, "depth": 1, "patch": 2, "channels": 4, "num_classes": 1000},
    ],
    ids=lambda s: f"width {s['width']}",
)
def test_other_sizes(sizes: dict[str, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tree = parameters(rng, **sizes)
    config, notes = convert(write(tmp_path / "c.pkl", checkpoint(tree, tree)), tmp_path / "out")
    assert len(notes) == 2, "neither heads nor image size can be found"
    assert config.shape[0] == sizes["channels"]
    model = sf.load(tmp_path / "out")
    expected = from_released(flat(tree))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.network.state_dict().items())
    assert model.sample(2, y=0).shape == (2, *config.shape)
    assert {384: 6, 40: 1, 16: 1}[sizes["width"]] == config.backbone.options["heads"]


@pytest.mark.parametrize("ignore", [False, True], ids=["shortcut", "naive"])
def test_step_size_from_gradients(ignore: bool, tmp_path: Path) -> None:
    """Real gradients of networks, in Adam's place."""
    rng = np.random.default_rng(0)
    tree = parameters(rng, **SMALL)
    sizes = {"channels": 3, "image_size": 8, "num_classes": 5, "hidden_size": 24, "depth": 2, "num_heads": 3}
    net = build({**sizes, "patch_size": 2, "mlp_ratio": 4}, flat(tree), ignore_step_size=ignore)
    x, y = torch.from_numpy(rng.normal(size=(6, 3, 8, 8))).float(), torch.tensor([0, 1, 2, 3, 4, 5])
    d = torch.tensor([1, 0.5, 0.25, 1 / 128, 1 / 64, 1 / 128])
    net(x, torch.linspace(0, 0.9, 6), d, y).square().sum().backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in net.named_parameters()}
    mu = nested(to_released(grads, patch=2))
    config, _ = convert(write(tmp_path / "c.pkl", checkpoint(tree, tree, mu=mu)), tmp_path / "out")
    assert config.backbone.options.get("ignore_step_size", False) == config.flow_only == ignore


def test_noise_for_gradients_says_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tree, mu = parameters(rng, **SMALL), parameters(rng, **SMALL)
    config, _ = convert(write(tmp_path / "c.pkl", checkpoint(tree, tree, mu=mu)), tmp_path / "out")
    assert not config.flow_only


def test_a_folder_in_use_is_left_alone(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(recorded, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"finest_steps": 100}, "power of two"),
        ({"heads": 7}, "heads must divide width"),
        ({"image_size": 9}, "patch must divide"),
    ],
    ids=["finest_steps", "heads", "image_size"],
)
def test_options_that_do_not_fit(options: dict[str, int], says: str, tmp_path: Path) -> None:
    tree = parameters(np.random.default_rng(0), **SMALL)
    with pytest.raises(ValueError, match=says):
        convert(write(tmp_path / "c.pkl", checkpoint(tree, tree)), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pkl"]


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    """What is wrong with the last array is found when all others are written; not even new parents stay."""
    tree = parameters(np.random.default_rng(0), **SMALL)
    bad = parameters(np.random.default_rng(0), **SMALL)
    bad["DiTBlock_1"]["Dense_1"]["bias"][3] = np.nan
    file = write(tmp_path / "c.pkl", checkpoint(tree, bad))
    with pytest.raises(ValueError, match=r"weights 'ema': DiTBlock_1/Dense_1/bias holds numbers that are not finite"):
        convert(file, tmp_path / "new/newer/out")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pkl"]


def test_without_jax(recorded: Path, tmp_path: Path) -> None:
    """Nothing of JAX, flax or optax is loaded, nor could be: they are not installed."""
    code = f"""
import sys
from shortcutflow.cli import main
try:
    main(["convert", {str(recorded)!r}, "--out", {str(tmp_path / "out")!r}])
except SystemExit as stop:
    assert stop.code == 0
print(sorted({{"jax", "flax", "optax", "huggingface_hub", "diffusers"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
    assert "assumed image size: " in out
    assert json.loads((tmp_path / "out/config.json").read_text())["format"] == "shortcutflow-model"


@pytest.mark.slow
def test_xl_fits_in_memory(tmp_path: Path) -> None:
    """DiT-XL/2 with its optimizer, 10.8 GB of zeros that take no room on the disk: the converted 5.4 GB do."""
    code = f"""
import resource, sys
from pathlib import Path
from shortcutflow.interop.convert import convert
from tests.interop.released_files import write_sparse_xl
write_sparse_xl(Path({str(tmp_path / "xl.pkl")!r}))
config, _ = convert(Path({str(tmp_path / "xl.pkl")!r}), Path({str(tmp_path / "out")!r}))
assert config.backbone.options["heads"] == 16, config
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    try:
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert int(out) < 2e9
        assert (tmp_path / "xl.pkl").stat().st_size > 10.7e9
        assert (tmp_path / "out/weights_ema.safetensors").stat().st_size > 2.69e9
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 8e9
