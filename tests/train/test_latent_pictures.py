"""Training on latents draws images: decoded on the training device, in batches, by one autoencoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shortcutflow as sf
from recipes.digits import paper_recipe as recipe
from shortcutflow import smoke
from shortcutflow.cli import main
from shortcutflow.config import with_overrides
from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.data.source import DataInfo
from shortcutflow.evaluation import decode
from shortcutflow.evaluation.decode import BATCH_SIZE, ImageDecoder
from shortcutflow.evaluation.sample_grid import image_grid, sample_grid
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.model import load
from shortcutflow.train.loop import train
from tests.data.test_autoencoder import tiny_network


class Counter:
    """Takes the place of ``load_autoencoder``: counts loads, and the rows of each call of the decoder."""

    def __init__(self) -> None:
        self.devices: list[Any] = []
        self.batches: list[int] = []
        self.seen_on: set[str] = set()

    def __call__(self, name: str, *, device: Any, **options: Any) -> Any:
        self.devices.append(device)
        autoencoder = load_autoencoder(name, device=device, **options)
        network: Any = autoencoder._network
        original = network.decode

        def counted(latents: torch.Tensor) -> Any:
            self.batches.append(len(latents))
            self.seen_on.add(latents.device.type)
            return original(latents)

        network.decode = counted
        return autoencoder


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    monkeypatch.setattr(decode, "load_autoencoder", counter)
    return counter


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    tiny_network().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_run_of_latents(tmp_path: Path, vae: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "LATENT_SHAPE", (4, 8, 8))
    made_by = {"vae": str(vae), "sha256": load_autoencoder(vae).sha256}
    monkeypatch.setattr(smoke, "LATENTS", smoke.LATENTS.model_copy(update=made_by))
    smoke.write_latents(tmp_path / "latents", 10)
    config = with_overrides(recipe(), [
        "data.kind=shards", f"data.folder={tmp_path / 'latents'}", "backbone.options.width=16", "evaluation=null",
        "backbone.options.depth=1", "training.steps=4", "training.grid_every=2", "training.grid_steps=[1,2]",
        "training.global_batch_size=8", "training.device=cpu",
    ])  # fmt: skip
    train(config, tmp_path / "run")
    assert counter.devices == [torch.device("cpu")], "one load for both grids, on the run's device"
    assert counter.seen_on == {"cpu"}
    # 10 samples for 1 and 2 steps; 2 real samples at 5 times in 3 rows, and themselves; 2 pairs of 7 columns.
    latents_a_grid = 20 + 2 * (5 * 3 + 1) + 14
    assert latents_a_grid + 20 == 86, "and 86 for four numbers of steps"
    assert BATCH_SIZE < sum(counter.batches) <= 2 * latents_a_grid
    assert len(counter.batches) <= 2 * -(-latents_a_grid // BATCH_SIZE)
    assert max(counter.batches) == BATCH_SIZE
    assert len(list((tmp_path / "run" / "grids").glob("*.png"))) == 2

    # The fewest latents that each can draw; two samples may have one neighbour.
    commands = {
        ("sample", "--steps", "1", "2", "--count", "3"): 6,
        ("plot", "trajectory", "--steps", "4", "--count", "2"): 2 * 5,
        ("plot", "interpolation", "--steps", "1", "--pairs", "2", "--columns", "3"): 6,
        ("plot", "neighbours", "--count", "2", "--nearest", "1"): 3,
        ("plot", "reconstruction", "--count", "2"): 2,
    }
    for number, (words, least) in enumerate(commands.items()):
        counter.devices.clear()
        counter.batches.clear()
        out = tmp_path / f"{number}.png"
        with pytest.raises(SystemExit) as stop:
            main([*words, str(tmp_path / "run"), "--out", str(out), "--device", "cpu"])
        assert stop.value.code == 0
        assert counter.devices == [torch.device("cpu")], words
        assert sum(counter.batches) >= least, words
        assert np.asarray(Image.open(out)).std() > 10

    # The picture of a sample is its latent's, decoded by the autoencoder itself.
    model = load(tmp_path / "run")
    latents = Sampler(model).samples(1, range(3))
    expected = image_grid([load_autoencoder(vae).decode(latents)], ["1 step"])
    np.testing.assert_array_equal(sample_grid(model, steps=[1], count=3), expected)

    # Latents of another autoencoder are none to go on with.
    other = {"sha256": "1" * 64, "scaling_factor": 0.5}
    monkeypatch.setattr(smoke, "LATENTS", smoke.LATENTS.model_copy(update=other))
    smoke.write_latents(tmp_path / "other", 10)
    further = [f"data.folder={tmp_path / 'other'}", "training.steps=6"]
    with pytest.raises(ValueError, match=r"trained on latents of .*scale 0\.18215.*now holds .*scale 0\.5"):
        train(with_overrides(config, further), tmp_path / "run", resume=True)

    # A copy is sampled where there is no data.
    drawn, info = sf.load(tmp_path / "run").sample(2, 1, generator=seeded()), config.data.describe()
    (tmp_path / "run").rename(tmp_path / "copy")
    shutil.rmtree(tmp_path / "latents")
    model = load(tmp_path / "copy")
    assert (model.info, model.null_y) == (info, 10.0)
    assert info.latents is not None
    assert info.latents.sha256 == load_autoencoder(vae).sha256
    model = sf.load(tmp_path / "copy")
    assert torch.equal(model.sample(2, 1, generator=seeded()), drawn)
    assert model.config.latents == info.latents
    assert Sampler(model).autoencoder is not None
    (tmp_path / "copy" / "data.json").write_text('{"shape": "wide"}')
    with pytest.raises(ValueError, match=r"data\.json does not describe a run's data"):
        load(tmp_path / "copy")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_equal_latents_are_decoded_once(vae: Path, counter: Counter) -> None:
    decoder = ImageDecoder(DataInfo((4, 8, 8), None, vae=str(vae)), "cpu")
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    grid, single = decoder(torch.stack([x, x.flip(0)]), x[1:2])
    assert counter.batches == [3]
    expected = load_autoencoder(vae).decode(x)
    assert grid.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(grid, torch.stack([expected, expected.flip(0)]))
    torch.testing.assert_close(single, expected[1:2])


def test_without_the_autoencoder_latents_are_shown(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    decoder, x = ImageDecoder(DataInfo((4, 8, 8), None, vae=str(tmp_path)), "cpu"), torch.ones(2, 4, 8, 8)
    for _ in range(2):
        assert torch.equal(decoder(x)[0], x[:, :3] / 2)
    assert caplog.text.count("latents are shown as they are") == 1
    assert torch.equal(ImageDecoder(DataInfo((4, 8, 8), None), "cpu")(x)[0], x)
