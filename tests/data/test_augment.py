"""Flips and latent draws: functions of (seed, epoch, sample), with the statistics that they should have."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shortcutflow.data.augment import Augmentation
from shortcutflow.data.index import read_index
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.stream import ShardStream
from shortcutflow.types import Batch
from tests.data.test_damage import flip_byte
from tests.data.test_order import write_moments
from tests.data.test_stream import write_numbers

COUNT = 2000
SCALE, SHIFT = 0.5, 0.25
"""What ``write_moments`` writes."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which none is its own mirror image."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    samples = (Sample(rng.integers(0, 256, (3, 4, 5), np.uint8), i % 3, f"n{i:03d}") for i in range(40))
    write_shards(samples, folder, samples_per_shard=11, num_classes=3, preprocessing="none")
    return folder


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments") / "shards"
    write_moments(folder, [700, 700, 600])
    return folder


def epoch_of(folder: Path, epoch: int, batch_size: int, *, flip: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """What each sample is in an epoch, by its name."""
    stream = ShardStream(folder, batch_size=batch_size, seed=seed, horizontal_flip=flip, workers=0)
    total = stream.manifest.samples
    stream.load_state_dict({"samples_seen": epoch * total})
    batches: list[Batch] = list(islice(stream, -(-total // batch_size)))
    rows = [(key, row) for batch in batches for key, row in zip(batch.keys, batch.data, strict=True)]
    return dict(rows[:total])


def flips(augmentation: Augmentation, epoch: int) -> np.ndarray:
    draws = augmentation.draw(np.full(COUNT, epoch), np.arange(COUNT))
    return np.array(draws.mirrored)


def test_half_of_the_samples_are_mirrored_anew_in_each_epoch(images: Path) -> None:
    augmentation = Augmentation(Manifest.read(images), seed=0, horizontal_flip=True)
    drawn = [flips(augmentation, epoch) for epoch in range(4)]
    four_deviations = 4 * np.sqrt(0.25 / COUNT)
    for i, one in enumerate(drawn):
        assert abs(one.mean() - 0.5) < four_deviations
        for other in drawn[:i]:
            assert abs((one == other).mean() - 0.5) < four_deviations, "epochs are independent of each other"
    assert abs((drawn[0][1:] == drawn[0][:-1]).mean() - 0.5) < four_deviations, "and so are samples"
    other_seed = flips(Augmentation(Manifest.read(images), seed=1, horizontal_flip=True), 0)
    assert abs((other_seed == drawn[0]).mean() - 0.5) < four_deviations, "and seeds"
    assert (flips(augmentation, 2) == drawn[2]).all()
    assert not flips(Augmentation(Manifest.read(images), seed=0, horizontal_flip=False), 0).any()


def test_flipped_pixels_are_exactly_mirrored(images: Path) -> None:
    kinds = []
    for epoch in range(3):
        plain, flipped = epoch_of(images, epoch, 7, flip=False), epoch_of(images, epoch, 7, flip=True)
        assert plain.keys() == flipped.keys(), "flips leave the order as it is"
        for key, row in plain.items():
            mirrored = torch.equal(flipped[key], row.flip(-1))
            assert mirrored != torch.equal(flipped[key], row)
            kinds.append(mirrored)
    assert 0.3 < np.mean(kinds) < 0.7
    assert kinds[:40] != kinds[40:80]


@pytest.mark.parametrize("kind", ["images", "moments"])
def test_the_batch_does_not_matter(images: Path, moments: Path, kind: str) -> None:
    """A sample of an epoch is the same in a batch of 1 as in one of 640."""
    folder = {"images": images, "moments": moments}[kind]
    reference = epoch_of(folder, 1, 640, flip=True)
    for batch_size in (3, 40):
        other = epoch_of(folder, 1, batch_size, flip=True)
        assert all(torch.equal(other[key], row) for key, row in reference.items())
    changed = epoch_of(folder, 1, 640, flip=True, seed=1)
    assert not all(torch.equal(changed[key], row) for key, row in reference.items())


def test_latents_are_drawn_from_their_posteriors(moments: Path) -> None:
    """latent = (mean + std eps - shift) * scale with standard normal eps, fresh in each epoch; here std = 1."""
    eps = []
    for epoch in (0, 1):
        for key, latent in epoch_of(moments, epoch, 50, flip=False).items():
            eps.append(latent / SCALE + SHIFT - int(key[1:]))
    drawn = torch.stack(eps).view(2, COUNT, 4)
    deviation = 1 / np.sqrt(drawn.numel())
    assert abs(drawn.mean()) < 4 * deviation
    assert abs(drawn.square().mean() - 1) < 4 * np.sqrt(2) * deviation
    assert abs(drawn.pow(4).mean() - 3) < 4 * np.sqrt(96) * deviation, "as normal numbers are"
    assert abs((drawn[..., :-1] * drawn[..., 1:]).mean()) < 5 * deviation, "pixels"
    by_sample = [epoch_of(moments, epoch, 50, flip=False) for epoch in (0, 1)]
    one, two = (torch.stack([rows[key] / SCALE + SHIFT - int(key[1:]) for key in sorted(rows)]) for rows in by_sample)
    assert abs((one * two).mean()) < 5 / np.sqrt(one.numel()), "epochs are independent"
    assert abs((one[1:] * one[:-1]).mean()) < 5 / np.sqrt(one.numel()), "samples are independent"
    again = epoch_of(moments, 0, 50, flip=False)
    assert all(torch.equal(again[key], row) for key, row in by_sample[0].items())


def test_the_mirrored_copy_is_taken_exactly_when_mirrored(tmp_path: Path) -> None:
    """Its mean tells it apart; with next to no variance, the latent is the mean."""
    manifest = write_moments(tmp_path / "moments", [30, 20], log_variance=-30.0)
    augmentation = Augmentation(manifest, seed=0, horizontal_flip=True)
    for epoch in range(3):
        mirrored = augmentation.draw(np.full(50, epoch), np.arange(50)).mirrored
        assert 0.2 < np.mean(mirrored) < 0.8
        rows = epoch_of(tmp_path / "moments", epoch, 10, flip=True)
        assert len(rows) == 50
        for key, latent in rows.items():
            number = int(key[1:])
            mean = -number - 1 if mirrored[number] else number
            torch.testing.assert_close(latent, torch.full((1, 2, 2), (mean - SHIFT) * SCALE), atol=1e-5, rtol=1e-6)
        assert all((row > -SHIFT).all() for row in epoch_of(tmp_path / "moments", epoch, 10, flip=False).values())


def test_a_flip_does_not_change_the_noise(tmp_path: Path) -> None:
    """The noise of a mirrored sample is not the noise of its neighbour, nor another one than without flips."""
    write_moments(tmp_path / "moments", [40])
    plain, flipped = (epoch_of(tmp_path / "moments", 0, 8, flip=flip) for flip in (False, True))
    for key, latent in flipped.items():
        number = int(key[1:])
        difference = (latent - plain[key]) / SCALE
        expected = 0.0 if difference.abs().max() < 0.4 else -2.0 * number - 1
        torch.testing.assert_close(difference, torch.full((1, 2, 2), expected), atol=1e-4, rtol=0)


def test_a_damaged_mirror_image_costs_only_itself(tmp_path: Path) -> None:
    """Whether the image itself is read does not hang on whether its mirror image was asked for before."""
    write_moments(tmp_path / "moments", [20], log_variance=-1000.0)
    index = read_index(tmp_path / "moments" / "shard-000000.index")
    flip_byte(tmp_path / "moments" / "shard-000000.tar", int(index.offset[7, 1]))
    stream = ShardStream(tmp_path / "moments", batch_size=20, seed=0, horizontal_flip=True, cache_bytes=0)
    seen: list[bool] = []
    for batch in islice(stream, 12):
        resumed = ShardStream(tmp_path / "moments", batch_size=20, seed=0, horizontal_flip=True, cache_bytes=0)
        resumed.load_state_dict({"samples_seen": 20 * len(seen)})
        assert next(resumed).keys == batch.keys
        seen.append("m007" in batch.keys)
    assert False in seen
    assert True in seen[seen.index(False) :]
    assert len(stream.damaged) == 1


def test_what_cannot_be_mirrored_is_refused(tmp_path: Path) -> None:
    write_moments(tmp_path / "moments", [5], mirrored=False)
    with pytest.raises(ValueError, match="needs the latents of the mirror images"):
        ShardStream(tmp_path / "moments", batch_size=2, seed=0, horizontal_flip=True)
    assert next(ShardStream(tmp_path / "moments", batch_size=2, seed=0)).data.shape == (2, 1, 2, 2)
    numbers = [Sample(np.zeros((4, 2), np.float32), None, f"n{i}") for i in range(5)]
    write_shards(numbers, tmp_path / "numbers", samples_per_shard=3, preprocessing="none")
    with pytest.raises(ValueError, match="horizontal_flip is for images"):
        ShardStream(tmp_path / "numbers", batch_size=2, seed=0, horizontal_flip=True)
    write_numbers(tmp_path / "images")
    next(ShardStream(tmp_path / "images", batch_size=2, seed=0, horizontal_flip=True))
