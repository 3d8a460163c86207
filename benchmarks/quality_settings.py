"""What the options of ``quality.py`` are compared on: data with a held-out half, and how samples are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shortcutflow as sf
from recipes import digits
from shortcutflow.config import RunConfig
from shortcutflow.data.digits import load_digits
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import ShardsData
from shortcutflow.evaluation.distances.frechet import frechet_distance
from shortcutflow.evaluation.features.digits import digit_classifier
from shortcutflow.evaluation.generate import noise_of

SAMPLES, BATCH = 2000, 250
Measured = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """Data and measures.

    Attributes:
        title: what the distances are.
        recipe_name, recipe: that all options override.
        overrides: of the recipe, for all options.
        steps: of the base.
        counts: numbers of sampling steps.
        measure: a finished run, by number of steps: "train", "held_out", "nearer", and "read" if labels can be read.
    """

    title: str
    recipe_name: str
    recipe: Callable[[], RunConfig]
    overrides: tuple[str, ...]
    steps: int
    counts: tuple[int, ...]
    measure: Callable[[Path], Measured]


def halves(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the samples to train on and of those held out: a half each."""
    order = np.random.default_rng(0).permutation(n)
    return order[: n // 2], order[n // 2 :]


def digits_setting(folder: Path, data: Path | None, steps: int | None) -> Setting:
    """Half of the digits; distances of pixels."""
    images, labels = load_digits()
    train, held_out = halves(len(images))
    shards = folder / "digits-half"
    if not shards.exists():

        def samples() -> Iterator[Sample]:
            for i in train:
                yield Sample(np.round((images[i] + 1) * 127.5).astype(np.uint8), int(labels[i]), f"digit{i:04d}")

        write_shards(samples(), shards, samples_per_shard=500, num_classes=10, preprocessing="half of the digits")
    sets = {name: images[of].reshape(len(of), -1) for name, of in (("train", train), ("held_out", held_out))}
    classifier, _ = digit_classifier()

    def measure(run: Path) -> Measured:
        return measure_samples(
            run, (1, 2, 4, 128), sets, lambda made: made.flatten(1).numpy(),
            lambda features, y: float((classifier.predict(features) == y).mean()),
        )  # fmt: skip

    return Setting(
        title="Digits, trained on half of them: Fréchet distance in pixel space of 2,000 samples to that half and "
        f"to the other half (one half to the other: {frechet_distance(sets['train'], sets['held_out']):.2f})",
        recipe_name="digits_paper", recipe=digits.paper_recipe,
        steps=steps or 2500, counts=(1, 2, 4, 128), measure=measure,
        overrides=("data.kind=shards", f"data.folder={shards}", "training.grid_every=0"),
    )  # fmt: skip


def cifar16_setting(folder: Path, data: Path | None, steps: int | None) -> Setting:
    """CIFAR-10 at 16x16; distances of the features of a classifier that was trained on all real pictures and frozen."""
    if data is None:
        raise SystemExit("--setting cifar16 needs --data, a folder or archive of CIFAR-10's pictures, a folder a class")
    source = (
        "data.kind=imagefolder",
        f"data.path={data.absolute()}",
        "data.size=16",
        f"data.folder={folder / 'cifar16'}",
    )
    options = 'backbone.options={"width":128,"depth":6,"heads":4,"patch":2}'
    images, labels = real_images(folder / "cifar16", data)
    train, held_out = halves(len(images))
    classifier = classifier_of(folder / "classifier16.pt", images, labels)
    features = {name: classifier.features_of(images[of]) for name, of in (("train", train), ("held_out", held_out))}

    def measure(run: Path) -> Measured:
        return measure_samples(
            run, (1, 2, 4, 16), features, classifier.features_of,
            lambda found, y: float((classifier.scores_of(found).argmax(1) == y).mean()),
        )  # fmt: skip

    return Setting(
        title="CIFAR-10 at 16x16: Fréchet distance of 2,000 samples in the features of a frozen classifier, to two "
        "halves of the real pictures (trained on both)",
        recipe_name="digits_paper", recipe=digits.paper_recipe,
        steps=steps or 1200, counts=(1, 2, 4, 16), measure=measure,
        overrides=(*source, options, "training.grid_every=0", "optimizer.lr=1e-3"),
    )  # fmt: skip


SETTINGS: dict[str, Callable[[Path, Path | None, int | None], Setting]] = {
    "digits": digits_setting,
    "cifar16": cifar16_setting,
}


def measure_samples(
    run: Path,
    counts: tuple[int, ...],
    real: dict[str, np.ndarray],
    features: Callable[[Tensor], np.ndarray],
    read: Callable[[np.ndarray, np.ndarray], float],
) -> Measured:
    """Distances of 2,000 samples of a run, labels in turn, at each number of steps."""
    model = sf.load(run)
    noise, y = noise_of(1, SAMPLES, model.shape), torch.arange(SAMPLES) % 10
    measured = {}
    for count in counts:
        made = [model.sample(noise[i : i + BATCH], y[i : i + BATCH], steps=count) for i in range(0, SAMPLES, BATCH)]
        found = features(torch.cat(made))
        nearest = {name: nearest_distance(found, of) for name, of in real.items()}
        measured[str(count)] = {
            **{name: frechet_distance(found, of) for name, of in real.items()},
            "nearer": float((nearest["train"] < nearest["held_out"]).mean()),
            "read": read(found, y.numpy()),
        }
    return measured


def nearest_distance(samples: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The distance of each sample (n, k) to its nearest real picture (m, k), (n,)."""
    return torch.cdist(torch.as_tensor(samples), torch.as_tensor(real)).amin(1).numpy()


def real_images(shards: Path, data: Path) -> tuple[Tensor, np.ndarray]:
    """All pictures (n, 3, 16, 16) float32 in [-1, 1], and their labels (n,)."""
    from shortcutflow.data.imagefolder import ImageFolderData

    source = ImageFolderData(path=data.absolute(), size=16, folder=shards)
    source.prepare()
    stream = ShardsData(folder=shards, workers=0).open_stream(batch_size=1000, seed=0)
    batches = [next(stream) for _ in range(stream.samples // 1000)]
    labels: Any = torch.cat([batch.y for batch in batches])
    return torch.cat([batch.data for batch in batches]), labels.numpy()


class Classifier(nn.Module):
    """Four convolutions and a linear layer; its features are the means over all places."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 128, 128)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.scores = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, 16, 16) to features (b, 128)."""
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            x = F.max_pool2d(x, 2) if i in (0, 1) else x
        return x.mean((2, 3))

    @torch.no_grad()
    def features_of(self, images: Tensor) -> np.ndarray:
        """(n, 128)."""
        return torch.cat([self(part) for part in images.clamp(-1, 1).split(1000)]).numpy()

    @torch.no_grad()
    def scores_of(self, features: np.ndarray) -> np.ndarray:
        """(n, 10)."""
        found: np.ndarray = self.scores(torch.as_tensor(features)).numpy()
        return found


def classifier_of(file: Path, images: Tensor, labels: np.ndarray) -> Classifier:
    """Trained once on nine tenths of the pictures, then read from its file; prints its accuracy on the last tenth."""
    torch.manual_seed(0)
    classifier = Classifier()
    if file.exists():
        classifier.load_state_dict(torch.load(file, weights_only=True))
        return classifier.eval()
    y, n = torch.as_tensor(labels), len(images) * 9 // 10
    steps = 3 * n // 128
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(n, (128,))
        batch = images[rows]
        batch = torch.where(torch.rand(128, 1, 1, 1) < 0.5, batch.flip(3), batch)
        F.cross_entropy(classifier.scores(classifier(batch)), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    classifier.eval()
    accuracy = (classifier.scores_of(classifier.features_of(images[n:])).argmax(1) == labels[n:]).mean()
    print(f"the classifier reads {accuracy:.1%} of the pictures that it was not trained on", flush=True)
    torch.save(classifier.state_dict(), file)
    return classifier
