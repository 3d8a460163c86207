"""The demo without its page: the library's own samples, counted calls, the same noise for all, refusals in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shortcutflow.data.digits import DigitsData
from shortcutflow.data.manifest import Manifest, ShardEntry
from shortcutflow.data.source import DataInfo
from shortcutflow.demo.answer import Demo, Settings, listed
from shortcutflow.evaluation import decode
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from tests.evaluation.evaluating import Plain, model_of, plain_model

SHAPE = (1, 8, 8)


def nothing(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
    """A velocity of zero, which leaves the noise as it is."""
    return torch.zeros_like(x_t)


@pytest.mark.parametrize("steps", [1, 3, 128])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_answer_is_what_the_library_samples(steps: int, guidance_scale: float) -> None:
    model = plain_model()
    settings = Settings(steps=steps, seed=7, count=12, guidance_scale=guidance_scale)
    (answer,) = Demo(model).answers(settings)
    expected = generate(
        model, noise_of(7, 12, SHAPE), labels_of(12, 10), steps=steps, guidance_scale=guidance_scale, seed=7
    )
    assert torch.equal(answer.images, expected)
    assert answer.calls == steps
    assert answer.milliseconds > 0


def test_the_path_leads_from_the_noise_to_the_first_image() -> None:
    (answer,) = Demo(plain_model()).answers(Settings(steps=8, count=3, label=4))
    assert answer.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(answer.path[0, 0], noise_of(0, 1, SHAPE)[0])
    assert torch.allclose(answer.path[-1, 0], answer.images[0], atol=1e-6)
    (short,) = Demo(plain_model()).answers(Settings(steps=1, count=3))
    assert short.t.tolist() == [0, 1]


def test_one_class_is_that_of_all_images() -> None:
    (answer,) = Demo(plain_model()).answers(Settings(count=5, label=9))
    assert answer.y is not None
    assert answer.y.tolist() == [9] * 5


def test_both_runs_start_from_the_same_noise() -> None:
    demo = Demo(model_of(nothing, DataInfo(SHAPE, 10)), model_of(nothing, DataInfo(SHAPE, 10), flow_only=True))
    first, second = demo.answers(Settings(seed=3, count=4, steps=2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.images, noise_of(3, 4, SHAPE))


def test_between_two_seeds() -> None:
    demo = Demo(model_of(nothing, DataInfo(SHAPE, 10)))

    def noise(u: float) -> Tensor:
        return demo.answers(Settings(seed=3, second_seed=4, u=u, count=4))[0].images

    assert torch.equal(noise(0), noise_of(3, 4, SHAPE))
    assert torch.equal(noise(1), noise_of(4, 4, SHAPE))
    assert torch.allclose(noise(0.5), (noise(0) + noise(1)) / 2**0.5, atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "the number of steps must be a whole number from 1 to 128, got 0"),
    ({"steps": 129}, "the number of steps must be a whole number from 1 to 128, got 129"),
    ({"steps": 2.5}, "the number of steps must be a whole number from 1 to 128, got 2.5"),
    ({"steps": True}, "got True"),
    ({"seed": None}, "the seed must be a whole number from 0 to 4294967295, got nothing"),
    ({"seed": -1}, "the seed must be .* got -1"),
    ({"seed": 10**400}, r"the seed must be .* got 10{36}\.\.\."),
    ({"seed": "1; drop"}, "the seed must be .* got '1; drop'"),
    ({"second_seed": float("inf")}, "the second seed must be .* got inf"),
    ({"count": 65}, "the number of images must be a whole number from 1 to 64, got 65"),
    ({"guidance_scale": float("nan")}, "the guidance scale must be a number from 0 to 10, got nan"),
    ({"guidance_scale": [1]}, r"the guidance scale must be .* got \[1\]"),
    ({"u": 1.01}, "the place between the seeds must be a number from 0 to 1, got 1.01"),
    ({"label": 10}, "there is no class 10: choose one of the list, a number from 0 to 9, or 'all in turn'"),
    ({"label": "-1"}, "there is no class '-1'"),
    ({"label": "²"}, "there is no class '²'"),
    ({"label": "9" * 5000}, r"there is no class '9{36}\.\.\."),
    ({"label": {"a": 1}}, "there is no class {'a': 1}"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[repr(values)[:30] for values, _ in REFUSED])
def test_refused_in_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Demo(plain_model()).settings(**values)


def test_values_of_a_page_are_settings() -> None:
    demo = Demo(plain_model())
    assert demo.settings() == Settings()
    assert demo.settings(4.0, 5, "3", 2, 64, 2**32 - 1, 1) == Settings(4, 5, 3, 2.0, 64, 2**32 - 1, 1.0)
    assert demo.settings(label="all in turn").label is None


def test_without_classes() -> None:
    demo = Demo(plain_model(info=DataInfo(SHAPE, None)))
    assert demo.answers(Settings(count=2))[0].y is None
    with pytest.raises(ValueError, match=r"guidance scale must be 1, got 3: the model knows no classes"):
        demo.settings(guidance_scale=3)
    with pytest.raises(ValueError, match=r"no classes to choose from, got '2'"):
        demo.settings(label="2")


class Doubling:
    """Stands for an autoencoder whose images have twice the side of its latents."""

    def decode(self, latents: Tensor, *, batch_size: int) -> Tensor:
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_latents_are_decoded_images_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(decode, "load_autoencoder", lambda vae, **_: loaded.append(vae) or Doubling())
    demo = Demo(plain_model(info=DataInfo((4, 8, 8), 10, vae="any")))
    for _ in range(2):
        (answer,) = demo.answers(Settings(steps=2, count=5))
        assert answer.images.shape == (5, 3, 16, 16)
        assert answer.path.shape == (3, 1, 3, 16, 16)
        assert torch.allclose(answer.path[-1, 0], answer.images[0], atol=1e-6)
    assert loaded == ["any"], "once for all answers"


def test_classes_have_the_names_of_the_data(tmp_path: Path) -> None:
    model = plain_model(info=DataInfo(SHAPE, 2), data=DigitsData(folder=tmp_path))
    assert Demo(model).class_names == ("0", "1")
    entry = ShardEntry(name="00000.tar", samples=1, bytes=1, sha256="0" * 64, index_sha256="0" * 64)
    manifest = Manifest(shape=SHAPE, num_classes=2, class_names=("cat", "dog"), preprocessing="none", shards=(entry,))
    manifest.write(tmp_path)
    demo = Demo(model)
    assert demo.class_names == ("cat", "dog")
    assert listed(demo.class_names) == ["0 cat", "1 dog"]
    assert demo.settings(label="dog").label == demo.settings(label=1).label == 1
    Manifest.model_validate(manifest.model_dump() | {"num_classes": 3, "class_names": ("a", "b", "c")}).write(tmp_path)
    assert Demo(model).class_names == ("0", "1"), "names of other data"


def test_runs_that_cannot_stand_side_by_side() -> None:
    other = plain_model(network=Plain(), info=DataInfo((3, 8, 8), 10))
    with pytest.raises(ValueError, match=r"--beside needs a run of the same data.*\(1, 8, 8\).*\(3, 8, 8\)"):
        Demo(plain_model(), other)
    with pytest.raises(ValueError, match="only images can be drawn"):
        Demo(plain_model(info=DataInfo((16, 2), None)))


def test_a_model_that_cannot_be_guided_says_so() -> None:
    model = plain_model()
    model = replace(model, config=model.config.model_copy(update={"null_y": None}))
    with pytest.raises(ValueError, match="null"):
        Demo(model).answers(Settings(guidance_scale=2))
