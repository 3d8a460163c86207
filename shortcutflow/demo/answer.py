"""The demo's answers: settings in, images, network calls and milliseconds out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.evaluation.generate import generate, labels_of, noise_of, require_images
from shortcutflow.evaluation.plots import mixed_noise, path_states
from shortcutflow.models.model import Model, load

MAX_STEPS = 128
MAX_IMAGES = 64
MAX_SEED = 2**32 - 1
MAX_GUIDANCE_SCALE = 10
PATH_COLUMNS = 5
"""States of the path, at most."""
ALL_CLASSES = "all in turn"


@dataclass(frozen=True)
class Settings:
    """What the page sends; :meth:`Demo.settings` checks it.

    Attributes:
        steps: of the sampler.
        seed: of the noise.
        label: the class of all images; None takes all classes in turn, or none where there are none.
        guidance_scale: of classifier-free guidance; 1 is none.
        count: number of images.
        second_seed: of the noise at the other end.
        u: from the first seed's noise, 0, to the second's, 1; see :func:`shortcutflow.evaluation.plots.mixed_noise`.
    """

    steps: int = 1
    seed: int = 0
    label: int | None = None
    guidance_scale: float = 1.0
    count: int = 20
    second_seed: int = 1
    u: float = 0.0


class Answer(NamedTuple):
    """What one model makes of the settings.

    Attributes:
        images: (count, 1 or 3, h, w) in [-1, 1].
        y: labels (count,), or None.
        calls: of the network, for all images together; guidance evaluates both conditions in one call.
        milliseconds: from noise to samples, without decoding and drawing.
        t: (c,), times of the first image's path.
        path: its states as images, (c, 1, 1 or 3, h, w).
    """

    images: Tensor
    y: Tensor | None
    calls: int
    milliseconds: float
    t: Tensor
    path: Tensor


class _Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Any:
        self.calls += 1
        return self.network(x_t, t, d, y)


class Demo:
    """One or two models side by side, each sampled from the same noise.

    Args:
        models: of equal samples and classes.

    Raises:
        ValueError: for samples that are not images, or models that differ in samples or classes.
    """

    def __init__(self, *models: Model) -> None:
        for model in models:
            require_images(model.info)
            if (model.shape, model.num_classes) != (models[0].shape, models[0].num_classes):
                raise ValueError(
                    f"--beside needs a run of the same data: {models[0].folder} makes samples of shape "
                    f"{models[0].shape} in {models[0].num_classes} classes, {model.folder} of shape {model.shape} in "
                    f"{model.num_classes}"
                )
        self.models = models
        self.class_names = next(filter(None, map(class_names, models)), ())
        self._decoders = [ImageDecoder(model.info, model.device) for model in models]

    @classmethod
    def open(cls, *places: str | Path, weights: str | None = None, device: torch.device | str = "cpu") -> Self:
        """Load the models and sample each once, so that the first answer is as fast as all others."""
        demo = cls(*(load(place, weights=weights, device=device) for place in places))
        demo.answers(Settings())
        return demo

    def settings(self, *values: Any, **named: Any) -> Settings:
        """Settings from values of any kind, as a page sends them: in the order or by the names of their fields.

        Raises:
            ValueError: saying what was given and what is allowed.
        """
        given = Settings(*values, **named)
        guidance = _number("the guidance scale", given.guidance_scale, 0, MAX_GUIDANCE_SCALE)
        if not self.class_names and guidance != 1:
            raise ValueError(f"the guidance scale must be 1, got {guidance:g}: the model knows no classes to guide by")
        return Settings(
            steps=_whole("the number of steps", given.steps, 1, MAX_STEPS),
            seed=_whole("the seed", given.seed, 0, MAX_SEED),
            label=self._label(given.label),
            guidance_scale=guidance,
            count=_whole("the number of images", given.count, 1, MAX_IMAGES),
            second_seed=_whole("the second seed", given.second_seed, 0, MAX_SEED),
            u=_number("the place between the seeds", given.u, 0, 1),
        )

    def _label(self, label: Any) -> int | None:
        """A class by its name or number; None for all in turn."""
        if label is None or label == ALL_CLASSES:
            return None
        if not self.class_names:
            raise ValueError(f"there are no classes to choose from, got {_shortened(label)}")
        text = str(label).strip()
        if text in self.class_names:
            return self.class_names.index(text)
        if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) >= len(self.class_names):
            raise ValueError(
                f"there is no class {_shortened(label)}: choose one of the list, a number from 0 to "
                f"{len(self.class_names) - 1}, or {ALL_CLASSES!r}"
            )
        return int(text)

    def answers(self, settings: Settings) -> list[Answer]:
        """What each model makes of the same noise."""
        return [answer(model, decode, settings) for model, decode in zip(self.models, self._decoders, strict=True)]


def answer(model: Model, decode: ImageDecoder, settings: Settings) -> Answer:
    """Sample one model.

    Raises:
        ValueError: for guidance of a model that has no null condition.
    """
    noise = noise_of(settings.seed, settings.count, model.shape, model.device)
    if settings.u > 0:
        other = noise_of(settings.second_seed, settings.count, model.shape, model.device)
        noise = mixed_noise(noise, other, settings.u)
    y = labels_of(settings.count, model.num_classes, model.device)
    if settings.label is not None and y is not None:
        y = torch.full_like(y, settings.label)
    network = _Counted(model.network)
    options: dict[str, Any] = {
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "seed": settings.seed,
    }
    start = time.perf_counter()
    # Copied to the CPU: a GPU is done only then.
    samples = generate(replace(model, network=network), noise, y, **options).cpu()
    milliseconds = 1000 * (time.perf_counter() - start)
    states = path_states(model, noise[:1], None if y is None else y[:1], columns=PATH_COLUMNS, **options)
    images, path = decode(samples, states.x_t.cpu())
    return Answer(images.float().cpu(), y, network.calls, milliseconds, states.t.cpu(), path.float().cpu())


def class_names(model: Model) -> tuple[str, ...]:
    """What a model's classes are called: as the shards of its data say if they are here, else by their numbers."""
    if model.num_classes is None:
        return ()
    shards = getattr(model.data, "shards", getattr(model.data, "folder", None))
    if isinstance(shards, Path) and (shards / MANIFEST).is_file():
        names = Manifest.read(shards).class_names
        if len(names) == model.num_classes:
            return names
    return tuple(map(str, range(model.num_classes)))


def listed(names: Sequence[str]) -> list[str]:
    """Class names for a list to choose from: numbered, unless they are the numbers."""
    return [name if name == str(i) else f"{i} {name}" for i, name in enumerate(names)]


def _whole(what: str, value: Any, lowest: int, highest: int) -> int:
    return int(_number(what, value, lowest, highest, whole=True))


def _number(what: str, value: Any, lowest: float, highest: float, *, whole: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # The order of comparison refuses nan, and an int that no float can hold is compared as it is.
    if not is_number or not lowest <= value <= highest or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        got = "nothing" if value is None else _shortened(value)
        raise ValueError(f"{what} must be {kind} from {lowest} to {highest}, got {got}")
    return float(value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
