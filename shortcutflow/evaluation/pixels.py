"""Quality of small images in pixel space, by sampling budget: Fréchet distance and readable labels.

The two belong together. A network that outputs class means is read correctly every time and is far in distance;
noise of the right variance is neither.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from shortcutflow.config import PixelEvaluation
from shortcutflow.data.digits import load_digits
from shortcutflow.evaluation.distances.frechet import frechet_distance
from shortcutflow.evaluation.drawing.grids import sample_grid, save_picture
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.runs import PICTURE_FILE, write_report
from shortcutflow.run_dir import Run


@dataclass(frozen=True)
class Row:
    """One sampling budget: steps, Fréchet distance, share read as the label asked for, seconds for all samples."""

    steps: int
    frechet: float
    read_correctly: float
    seconds: float


class DigitReader:
    """A support vector classifier of the real digits, trained on every image but each fifth.

    Attributes:
        accuracy: on the held-out fifth.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = load_digits()
        flat = images.reshape(len(images), -1)
        held_out = np.arange(len(flat)) % 5 == 0
        self._classifier = SVC(C=10, gamma=0.05).fit(flat[~held_out], labels[~held_out])
        self.accuracy = float(self._classifier.score(flat[held_out], labels[held_out]))
        if self.accuracy < 0.97:
            raise RuntimeError(f"the classifier reads only {self.accuracy:.1%} of held-out digits, 97 % are expected")

    def share_correct(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images (n, 64) that are read as their label."""
        return float(self._classifier.score(images, labels))


def evaluate_pixels(run: Run) -> list[Row]:
    """Measure a digits run at every budget of its evaluation config; write the report and the picture into its folder.

    Raises:
        ValueError: if the run has no evaluation.
    """
    settings, config, options = run.config.evaluation, run.config, run.config.sampler_options(run.info)
    if not isinstance(settings, PixelEvaluation):
        raise ValueError(f"the config of run {run.folder} has no evaluation of pixels")
    real = load_digits()[0].reshape(1797, -1)
    reader = DigitReader()
    device = next(run.network.parameters()).device
    noise = noise_of(config.seed, settings.samples, (1, 8, 8), device)
    labels = labels_of(settings.samples, 10, device)
    rows, pictures = [], []
    for steps in settings.steps:
        start = time.perf_counter()
        images = generate(
            run.network,
            noise,
            labels,
            steps=steps,
            guidance_scale=settings.guidance_scale,
            **options,
        )
        flat = images.flatten(1).float().cpu().numpy()
        seconds = time.perf_counter() - start
        correct = reader.share_correct(flat, labels.cpu().numpy()) if labels is not None else 0.0
        rows.append(Row(steps, frechet_distance(flat, real), correct, seconds))
        pictures.append(images[:20])
    save_picture(
        sample_grid(pictures, [f"{s} step{'s' * (s > 1)}" for s in settings.steps]), str(run.folder / PICTURE_FILE)
    )
    write_report(
        run, rows=rows, classifier_held_out_accuracy=reader.accuracy, real_against_real=real_against_real(),
        protocol="Fréchet distance between Gaussian fits of the 64 pixels, samples against all 1,797 real digits",
    )  # fmt: skip
    return rows


def real_against_real(count: int = 256) -> float:
    """The distance of some real digits to the rest: what no sampler needs to beat."""
    images = load_digits()[0].reshape(1797, -1)
    order = np.random.default_rng(0).permutation(len(images))
    return frechet_distance(images[order[:count]], images[order[count:]])


def table(rows: list[Row]) -> str:
    """The rows as a table for people."""
    lines = ["steps   Fréchet distance   read as the label asked for   seconds"]
    lines += [f"{r.steps:5d}   {r.frechet:16.2f}   {r.read_correctly:27.1%}   {r.seconds:7.1f}" for r in rows]
    return "\n".join(lines)
