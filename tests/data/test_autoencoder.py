"""The autoencoder: diffusers' numbers under our names, weights told apart by their hash, errors that say what to do."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from shortcutflow import smoke
from shortcutflow.data.autoencoder import (
    DEFAULT_VAE,
    Autoencoder,
    draw_latents,
    load_autoencoder,
    weights_sha256,
)
from shortcutflow.data.manifest import LatentsInfo
from shortcutflow.data.source import DataInfo, ShardsData
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.evaluation.samples import Sampler
from tests.evaluation.evaluating import model_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that diffusers tries to import
    diffusers = pytest.importorskip("diffusers")


def tiny_network(seed: int = 0, **options: Any) -> Any:
    """A small AutoencoderKL with random weights: 4 latent channels, downsampling 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **options,
        ).eval().requires_grad_(False)  # fmt: skip


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    tiny_network().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(vae_folder: Path) -> Autoencoder:
    return load_autoencoder(vae_folder)


def images(count: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_attributes(autoencoder: Autoencoder, vae_folder: Path) -> None:
    assert (autoencoder.name, autoencoder.scaling_factor, autoencoder.shift_factor) == (str(vae_folder), 0.18215, 0.0)
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (4, 2)
    assert autoencoder.latent_shape(16) == (4, 8, 8)
    with pytest.raises(ValueError, match="sizes that 2 divides, got 15"):
        autoencoder.latent_shape(15)


def test_moments_are_those_of_diffusers(autoencoder: Autoencoder) -> None:
    moments = autoencoder.encode(images())
    with torch.no_grad():
        expected = tiny_network().encode(images()).latent_dist
    assert moments.shape == (3, 8, 8, 12)
    torch.testing.assert_close(moments, torch.cat([expected.mean, expected.logvar], dim=1), rtol=0, atol=0)
    assert not moments.requires_grad


def test_log_variance_is_limited_and_the_mean_is_not() -> None:
    network = tiny_network()
    with torch.no_grad():
        network.quant_conv.bias.copy_(torch.tensor([100.0] * 4 + [100.0, -100.0, 0.0, 0.0]))
        expected = network.encode(images()).latent_dist.logvar
    moments = Autoencoder(network, "extreme").encode(images())
    assert (moments[:, 4] == 20).all()
    assert (moments[:, 5] == -30).all()
    assert torch.equal(moments[:, 4:], expected)
    assert moments[:, :4].min() > 50


def test_decode_undoes_scale_and_shift_in_any_batch_size() -> None:
    network = tiny_network(scaling_factor=0.25, shift_factor=0.5)
    autoencoder = Autoencoder(network, "shifted")
    assert (autoencoder.scaling_factor, autoencoder.shift_factor) == (0.25, 0.5)
    unscaled = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.decode(unscaled).sample.clamp(-1, 1)
    latents = (unscaled - 0.5) * 0.25
    assert expected.shape == (5, 3, 16, 16)
    for batch_size in (2, 16):
        torch.testing.assert_close(autoencoder.decode(latents, batch_size=batch_size), expected)
    assert (autoencoder.decode(unscaled) - expected).abs().max() > 1e-2, "the scale matters"
    assert autoencoder.decode(1e4 * latents).abs().max() == 1


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 15, 16), (2, 3, 16, 17)], ids=str)
def test_other_images_are_refused(autoencoder: Autoencoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(b, 3, h, w\)|sizes that 2 divides"):
        autoencoder.encode(torch.zeros(shape))


def test_other_latents_are_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match=r"latents must be \(b, 4, h, w\), got \(2, 3, 8, 8\)"):
        autoencoder.decode(torch.zeros(2, 3, 8, 8))


def test_hash_stands_for_the_weights(vae_folder: Path, tmp_path: Path, autoencoder: Autoencoder) -> None:
    """The same after saving, in another file format and order; another for one changed number, name or shape."""
    weights = tiny_network().state_dict()
    assert load_autoencoder(vae_folder).sha256 == autoencoder.sha256 == weights_sha256(weights)
    torch.save(weights, tmp_path / "weights.pt")
    assert weights_sha256(torch.load(tmp_path / "weights.pt", weights_only=True)) == autoencoder.sha256
    assert weights_sha256(dict(reversed(weights.items()))) == autoencoder.sha256
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["quant_conv.bias"][3] += 1e-6
    renamed = {name.replace("quant_conv.bias", "quant_conv.bias2"): tensor for name, tensor in weights.items()}
    reshaped = weights | {"quant_conv.bias": weights["quant_conv.bias"][None]}
    hashes = [weights_sha256(other) for other in (weights, changed, renamed, reshaped, tiny_network(1).state_dict())]
    assert len(set(hashes)) == 5


def test_weights_of_old_files(vae_folder: Path, tmp_path: Path, autoencoder: Autoencoder) -> None:
    """Stable Diffusion's files name the parts of attention as diffusers once did; they are the same weights."""
    from safetensors.torch import save_file

    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = tiny_network().state_dict()
    for now, before in old.items():
        weights = {name.replace(now, before): tensor.contiguous() for name, tensor in weights.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    shutil.copy(vae_folder / "config.json", tmp_path)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    loaded = load_autoencoder(tmp_path)
    assert loaded.sha256 == autoencoder.sha256
    assert torch.equal(loaded.encode(images()), autoencoder.encode(images()))


def test_latents_meet_only_their_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two folders of one name: whatever takes latents compares weights, scale and shift, not names."""
    tiny_network().save_pretrained(tmp_path / "a" / "vae")
    tiny_network(1).save_pretrained(tmp_path / "b" / "vae")
    tiny_network(scaling_factor=0.5).save_pretrained(tmp_path / "scaled" / "vae")
    tiny_network(shift_factor=0.1).save_pretrained(tmp_path / "shifted" / "vae")
    right = load_autoencoder(tmp_path / "a" / "vae")
    made = LatentsInfo(vae=right.name, sha256=right.sha256, scaling_factor=0.18215, mirrored=True)
    monkeypatch.setattr(smoke, "LATENTS", made)
    monkeypatch.setattr(smoke, "LATENT_SHAPE", (4, 4, 4))
    smoke.write_latents(tmp_path / "latents", None)

    def info(vae: Path | str | None = None) -> DataInfo:
        return ShardsData(folder=tmp_path / "latents", vae=None if vae is None else str(vae)).describe()

    monkeypatch.chdir(tmp_path / "a")
    shutil.copytree("vae", "copy")
    for same in ("vae", "copy", right.name, None):
        assert info(same) == DataInfo((4, 4, 4), None, None, right.name, made)
    for folder, differs in (("b", "sha256"), ("scaled", "scaling_factor"), ("shifted", "shift_factor")):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(ValueError, match=rf"made with the autoencoder {right.name}, not with .*{differs} "):
            info("vae")
    for wrong in ("no-folder", DEFAULT_VAE):
        with pytest.raises(ValueError, match=f"latents of '{right.name}', data.vae says '{wrong}'"):
            info(wrong)

    # Decoding: the folder has another autoencoder by now.
    found, x = info(), torch.zeros(1, 4, 4, 4)
    shutil.rmtree(right.name)
    shutil.copytree(tmp_path / "b" / "vae", right.name)
    assert torch.equal(ImageDecoder(found, "cpu")(x)[0], x[:, :3])
    assert "latents are shown as they are, not as images: these latents were made with" in caplog.text
    model = model_of(torch.nn.Identity(), found)
    with pytest.raises(ValueError, match="these latents were made with"):
        Sampler(model)
    decoders = [Sampler(model, vae=tmp_path / "a" / "copy"), Sampler(model, vae=tmp_path / "b" / "vae")]
    assert [d.autoencoder is not None and d.autoencoder.sha256 == right.sha256 for d in decoders] == [True, False]
    assert caplog.text.count("it decodes them all the same") == 1
    with pytest.raises(ValueError, match=r"scaling_factor 0\.18215, here 0\.5"):
        Sampler(model, vae=tmp_path / "scaled" / "vae")


def test_drawn_latents_have_the_posterior_s_mean_and_deviation() -> None:
    mean, log_variance = torch.tensor([0.5, -2.0]), torch.tensor([-1.0, 0.6])
    moments = torch.cat([mean, log_variance]).view(1, 4, 1, 1).expand(40000, 4, 1, 1).half()
    noise = torch.randn(40000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    latents = draw_latents(moments, noise, 0.18215, 0.1).flatten(1)
    assert latents.dtype == torch.float32
    deviation = torch.exp(log_variance / 2) * 0.18215
    # 40,000 draws leave an error of deviation / 200 in the mean and / 283 in the deviation; five times that is allowed.
    assert ((latents.mean(0) - (mean - 0.1) * 0.18215).abs() < deviation / 40).all()
    assert ((latents.std(0) - deviation).abs() < deviation / 50).all()
    assert ((latents.std(0) - torch.exp(log_variance) * 0.18215).abs() > deviation / 5).all(), "it is not the variance"


def test_no_noise_gives_the_scaled_mean() -> None:
    moments = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw_latents(moments, torch.zeros(2, 4, 3, 3), 0.5, 2.0), (moments[:, :4] - 2) / 2)
    with pytest.raises(ValueError, match="half the channels"):
        draw_latents(moments, torch.zeros(2, 8, 3, 3), 1.0)
    with pytest.raises(ValueError, match="half the channels"):
        draw_latents(moments, torch.zeros(1, 4, 3, 3), 1.0)


def test_missing_download_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"stabilityai/sd-vae-ft-mse .* config\.json cannot be downloaded") as caught:
        load_autoencoder(DEFAULT_VAE)
    assert "give a local folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./vae", "a/b/c"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {path}"):
        load_autoencoder(path)


def test_pickled_weights_are_not_read(vae_folder: Path, tmp_path: Path) -> None:
    shutil.copy(vae_folder / "config.json", tmp_path)
    torch.save(tiny_network().state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        load_autoencoder(tmp_path)


def test_missing_weights_are_not_left_random(vae_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor for name, tensor in tiny_network().state_dict().items() if name != "quant_conv.bias"}
    shutil.copy(vae_folder / "config.json", tmp_path)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not complete: 1 weights missing, such as quant_conv\.bias"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "noise", "shape"])
def test_damaged_weights(vae_folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(vae_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "shape":
        config = json.loads((tmp_path / "config.json").read_text()) | {"latent_channels": 5}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "cut" else bytes(range(256)) * 8)
    with pytest.raises(ValueError, match=r"autoencoder .* (cannot be read|is not complete)") as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "UNet2DModel"}, "describes 'UNet2DModel'"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "normalises each latent channel"),
    ],
    ids=["kind", "channels"],
)
def test_other_configs_are_refused(vae_folder: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    shutil.copytree(vae_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=says):
        load_autoencoder(tmp_path)


def test_without_diffusers(vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"shortcutflow\[latents\]"):
        load_autoencoder(vae_folder)


def test_the_papers_autoencoder() -> None:
    """Where its weights are cached: an image comes back within a few grey levels, latents have deviation near 1."""
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(DEFAULT_VAE, "diffusion_pytorch_model.safetensors"), str):
        pytest.skip(f"{DEFAULT_VAE} is not in the local cache")
    autoencoder = load_autoencoder()
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (4, 8)
    assert autoencoder.scaling_factor == pytest.approx(0.18215)
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp[None].expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    moments = autoencoder.encode(image)
    latents = draw_latents(moments, torch.zeros(1, 4, 8, 8), autoencoder.scaling_factor)
    assert 0.3 < latents.std() < 3
    assert (autoencoder.decode(latents) - image).abs().mean() < 8 / 127.5
