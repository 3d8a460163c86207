"""Models from folders and runs: loaded, sampled, saved, described; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shortcutflow as sf
from shortcutflow.cli import main
from shortcutflow.config import RunConfig
from shortcutflow.interop.hub import HubModel
from shortcutflow.models.config import ModelConfig
from shortcutflow.models.model import HUB_FILES, Model
from shortcutflow.network import BackboneConfig, build_network
from shortcutflow.run_dir import info_of_run, read_weights, write_weights

OPTIONS = {"width": 16, "depth": 1, "heads": 2}


def model_in(folder: Path, **changes: object) -> Path:
    """A small model's folder with random current and averaged weights."""
    folder.mkdir(exist_ok=True)
    config = ModelConfig(
        backbone=BackboneConfig(name="dit", options=OPTIONS), shape=(3, 8, 8), num_classes=4, null_y=4,
        weights=("current", "ema"), default_weights="ema", step=10,
    )  # fmt: skip
    values = config.model_dump(mode="json") | changes
    (folder / "config.json").write_text(json.dumps(values))
    for seed, file in enumerate(("weights.safetensors", "weights_ema.safetensors")):
        net = build_network(config.backbone, shape=(3, 8, 8), num_classes=4, finest_steps=128, seed=seed)
        for name in ("head.out.weight", "head.modulation.weight"):  # zero at first, so that nothing would matter
            torch.nn.init.normal_(net.get_parameter(name), generator=torch.Generator().manual_seed(seed))
        save_file(net.state_dict(), folder / file)
    return folder


def noise(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run of the digits recipe, its network with the released code's conventions."""
    folder = tmp_path_factory.mktemp("home")
    argv = [
        "train",
        "digits_paper",
        "--smoke",
        "--run-dir",
        str(folder / "run"),
        "training.grid_steps=[1]",
        "evaluation=null",
    ]
    argv += ["backbone.options.width=16", "backbone.options.depth=1", "backbone.options.released=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        write_weights(folder / "run")
    return folder / "run"


def test_weights_by_name(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "m")
    by_default, ema, current = sf.load(folder), sf.load(folder, weights="ema"), sf.load(str(folder), weights="current")
    assert (by_default.weights, current.weights) == ("ema", "current")
    x = [model.sample(noise(), torch.tensor([0, 1, 2]), steps=2) for model in (by_default, ema, current)]
    assert torch.equal(x[0], x[1])
    assert (x[0] - x[2]).abs().max() > 1e-2
    assert not by_default.network.training


def test_weights_of_a_file(run: Path, tmp_path: Path) -> None:
    """An EMA of another width, as ``shortcutflow average`` writes it, for a model and for a run."""
    folder = model_in(tmp_path / "m")
    for place, expected in ((folder, sf.load(folder, weights="current")), (run, sf.load(run, weights="current"))):
        file = tmp_path / f"{place.name}-0.1.safetensors"
        save_file(expected.network.state_dict(), file, metadata={"step": "7"})
        model = sf.load(place, weights=str(file))
        assert (model.weights, model.config.step) == (f"{place.name}_0_1", 7)
        model.save(tmp_path / f"saved-{place.name}")
        again = sf.load(tmp_path / f"saved-{place.name}", weights=model.weights)
        for each in (model, again):
            state = each.network.state_dict()
            assert all(torch.equal(state[name], t) for name, t in expected.network.state_dict().items())


def test_samples_as_the_sampler(tmp_path: Path) -> None:
    """The model hands its null condition, finest steps and kind of training to the sampler."""
    folder = model_in(tmp_path / "m", finest_steps=32, flow_only=True)
    model = sf.load(folder)
    y = torch.tensor([0, 1, 2])
    options = {"steps": 4, "guidance_scale": 2.0, "null_y": 4}
    expected = sf.sample(model.network, noise(), y, finest_steps=32, flow_only=True, **options)
    told = sf.sample(model.network, noise(), y, finest_steps=32, **options)
    assert torch.equal(model.sample(noise(), y, steps=4, guidance_scale=2.0), expected)
    assert (told - expected).abs().max() > 1e-4, "flow_only must matter here"


def test_counts_and_labels(tmp_path: Path) -> None:
    model = sf.load(model_in(tmp_path / "m"))
    first, second = (model.sample(5, 3, steps=3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (5, 3, 8, 8)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="labels must be from 0 to 4"):
        model.sample(2, 5)
    with pytest.raises(ValueError, match="must be at least 1"):
        model.sample(0)


def test_another_image_size(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "m")
    small, large = sf.load(folder), sf.load(folder, image_size=16)
    assert large.sample(1).shape == (1, 3, 16, 16)
    weights = large.network.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in small.network.state_dict().items())
    with pytest.raises(ValueError, match="patch must divide"):
        sf.load(folder, image_size=9)


def test_run_folder(run: Path, tmp_path: Path) -> None:
    """A run loads as it is, and so does a folder of runs."""
    model, config = sf.load(run), RunConfig.load(run)
    expected = read_weights(run, config)
    assert model.weights == expected.name == sf.load(run.parent).weights == "ema"
    assert model.config.step == expected.step == 4
    assert (model.name, model.info, model.data) == (config.name, info_of_run(run, config), config.data)
    assert model.sampler_options() == config.sampler_options()
    for name, tensor in expected.tensors.items():
        assert torch.equal(model.network.state_dict()[name], tensor)
    current = sf.load(run, weights="current").network.state_dict()
    assert any(not torch.equal(current[name], tensor) for name, tensor in model.network.state_dict().items())
    assert model.sample(2, 1, steps=2).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="it has: ema, current"):
        sf.load(run, weights="slow")


def test_saved_run_needs_no_data(run: Path, tmp_path: Path) -> None:
    model = sf.load(run)
    model.save(tmp_path / "m")
    again = sf.load(tmp_path / "m")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.sample(x, 1, steps=3), model.sample(x, 1, steps=3))


def test_hub_mixin(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "m")
    HubModel(sf.load(folder)).save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "weights.safetensors", "weights_ema.safetensors", "README.md"}
    for weights in ("ema", "current"):
        again = HubModel.from_pretrained(tmp_path / "saved", weights=weights).model
        assert isinstance(again, Model)
        assert again.config == sf.load(folder).config
        assert torch.equal(again.sample(noise(), steps=2), sf.load(folder, weights=weights).sample(noise(), steps=2))


def test_saving_in_place(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "m")
    before = sf.load(folder, weights="current").sample(noise())
    HubModel(sf.load(folder)).save_pretrained(folder)
    assert torch.equal(sf.load(folder, weights="current").sample(noise()), before)


def test_push_uploads_the_folder_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: what would be uploaded, looked at."""
    seen: dict[str, str] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> object:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **_: object) -> str:
            seen.update(
                {path.name: path.read_bytes()[:2000].decode(errors="replace") for path in folder_path.iterdir()}
            )
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert HubModel(sf.load(model_in(tmp_path / "m"))).push_to_hub("me/toy") == "commit"
    assert {"config.json", "weights_ema.safetensors", "README.md"} <= seen.keys()
    assert 'shortcutflow.load("me/toy")' in seen["README.md"]


def test_hub_ids_go_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    folder = model_in(tmp_path / "m")

    def snapshot(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(folder / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert sf.load("me/toy", weights="current").weights == "current"
    assert HubModel.from_pretrained("me/toy").model.weights == "ema"
    assert (asked["repo"], asked["allow_patterns"]) == ("me/toy", HUB_FILES), "nothing but config, weights and reports"


def test_card_says_what_was_measured(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "m", vae="some/vae", about={"data": "toys"})
    rows = [{"steps": 1, "values": {"frechet": 2.34567}}, {"steps": 4, "values": {"frechet": 1.5}}]
    (folder / "evaluation.json").write_text(json.dumps({"protocol": "pixels", "rows": rows}))
    by_protocol = {
        "protocol": {"name": "adm", "description": "as ADM"}, "samples": 50_000, "subject": {"weights": "ema"},
        "rows": [{"steps": 1, "values": {"fid": 12.5}, "seconds": {"sampling": 9}}],
    }  # fmt: skip
    (folder / "evaluation-adm.json").write_text(json.dumps(by_protocol))
    (folder / "samples.png").write_bytes(b"png")
    HubModel(sf.load(folder)).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/evaluation-adm.json").is_file()
    card = (tmp_path / "saved/README.md").read_text()
    for words in ("| 1 | 2.346 |", "| 4 | 1.5 |", "protocol: pixels", "![samples](samples.png)", "| data | toys |",
                  "| steps | fid |", "| 1 | 12.5 |", "protocol: adm (as ADM); samples: 50000; weights: ema",
                  "`some/vae`", "| width | 16 |", "library_name: shortcutflow"):  # fmt: skip
        assert words in card, words
    (folder / "evaluation-adm.json").unlink()
    (folder / "evaluation.json").write_text("{broken")
    HubModel(sf.load(folder)).save_pretrained(tmp_path / "other")
    assert "Quality" not in (tmp_path / "other/README.md").read_text()


MISTAKES = {
    "unknown backbone": (
        {"backbone": {"name": "dti", "options": {}}},
        "unknown backbone 'dti'; did you mean 'dit'. known: diffusers_unet, dit",
    ),
    "module as backbone": ({"backbone": {"name": "os.system", "options": {}}}, "unknown backbone 'os.system'"),
    "other width": ({"backbone": {"name": "dit", "options": OPTIONS | {"width": 32}}}, "do not fit the network"),
    "unknown option": ({"backbone": {"name": "dit", "options": {"widht": 32}}}, "widht"),
    "unknown field": ({"trust_remote_code": True}, "trust_remote_code: Extra inputs are not permitted"),
    "later version": ({"version": 2}, "version: Input should be 1"),
    "path as weights": ({"weights": ["../x"], "default_weights": "../x"}, "weights"),
    "default missing": ({"default_weights": "slow"}, "weights: current, ema"),
    "weights without file": ({"weights": ["slow"], "default_weights": "slow"}, "there is no file"),
}


@pytest.mark.parametrize(("changes", "says"), MISTAKES.values(), ids=MISTAKES)
def test_configs_that_are_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says.replace("(", "\\(")) as error:
        sf.load(model_in(tmp_path / "m", **changes))
    assert len(str(error.value).splitlines()) == 1


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        sf.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        sf.load(tmp_path / "empty")
    folder = model_in(tmp_path / "m")
    (folder / "weights_ema.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(U\x01xtR.")
    with pytest.raises(ValueError, match="no safetensors file"):
        sf.load(folder)
    for text in ("", "[]", "{" * 100_000, '{"format": "shortcutflow-model"'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            sf.load(folder)


def test_exports_that_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["export", *argv])
        assert stop.value.code == 2
        return capsys.readouterr().err

    folder, out = str(model_in(tmp_path / "m")), str(tmp_path / "x.pt2")
    assert "unknown format 'onnyx'; known: " in fails(folder, "--out", out, "--format", "onnyx")
    assert "there is no folder" in fails(str(run), "--format", "torch", "--out", str(tmp_path / "none/x.pt2"))
    assert "--format" in fails(folder, "--out", out), "no format is taken without a word"
    (tmp_path / "x.pt2").write_bytes(b"mine")
    assert "exists already" in fails(str(run), "--format", "torch", "--out", out)
    assert (tmp_path / "x.pt2").read_bytes() == b"mine"


def test_load_is_found_late() -> None:
    code = "import shortcutflow, sys; print('shortcutflow.models.model' in sys.modules, shortcutflow.load.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "load"]
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = sf.laod
    assert "load" in sf.__all__


def test_a_model_is_sampled_by_the_sampler_it_is_made_for(tmp_path: Path) -> None:
    """A consistency model jumps to the end and back; Euler's steps would give other samples, and no error."""
    made_for = sf.load(model_in(tmp_path / "consistency", sampler="consistency"))
    other = sf.load(model_in(tmp_path / "euler"))
    samples = made_for.sample(noise(), 1, steps=2, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(samples, other.sample(noise(), 1, steps=2))
    assert torch.equal(samples, made_for.sample(noise(), 1, steps=2, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="noise"):
        made_for.sample(noise(), 1, steps=2)
