"""The driver of evaluations: the numbers, the report, what is used again, and one clear line for every mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from shortcutflow.data.digits import load_digits
from shortcutflow.data.source import DataInfo
from shortcutflow.evaluation import feature_set
from shortcutflow.evaluation import samples as samples_module
from shortcutflow.evaluation.distances.frechet import frechet_distance
from shortcutflow.evaluation.distances.inception_score import inception_score
from shortcutflow.evaluation.distances.kernel_distance import kernel_distance
from shortcutflow.evaluation.distances.manifold import manifold_metrics
from shortcutflow.evaluation.evaluate import evaluate
from shortcutflow.evaluation.feature_set import hash_of
from shortcutflow.evaluation.features.extractors import Extracted, NetworkExtractor
from shortcutflow.evaluation.features.protocols import EvaluationProtocol, open_protocol
from shortcutflow.evaluation.features.resize import clean_fid_resize
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.metrics import METRICS
from shortcutflow.evaluation.real_images import digit_images, save_pngs
from shortcutflow.evaluation.report import table_of
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.model import Model
from shortcutflow.network import BackboneConfig
from tests.evaluation.evaluating import Plain, plain_model

ALL = tuple(METRICS)
LOGITS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits() -> EvaluationProtocol:
    return open_protocol("digits")


@pytest.fixture(scope="module")
def pixels() -> EvaluationProtocol:
    return open_protocol("pixels")


@pytest.fixture(scope="module")
def read(digits: EvaluationProtocol) -> EvaluationProtocol:
    """The protocol digits, with class scores."""

    def scores(images: np.ndarray) -> Extracted:
        features = digits.extractor(images).features
        return Extracted(features, (features @ LOGITS.numpy()).astype(np.float32))

    scores.name = "digits with scores"  # type: ignore[attr-defined]
    return replace(digits, name="scores", extractor=scores)  # type: ignore[arg-type]


def evaluated(sampler: Sampler, protocol: EvaluationProtocol, out: Path, **request: Any) -> dict[str, Any]:
    report = evaluate(sampler, protocol, out, **{"steps": (1,), "samples": 120} | request)
    assert report is not None
    return report


@pytest.mark.parametrize(("samples", "names"), [(150, ALL), (1100, ("fid", "is", "density"))], ids=["one", "parts"])
def test_values_are_those_of_the_functions(
    tmp_path: Path, read: EvaluationProtocol, samples: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches, checkpoints and files change nothing."""
    monkeypatch.setattr(feature_set, "CHECKPOINT_EVERY", 300)
    sampler = Sampler(plain_model(), seed=3, batch_size=64)
    (row,) = evaluated(sampler, read, tmp_path / "r.json", samples=samples, metrics=names)["rows"]
    labels = labels_of(samples, 10)
    assert labels is not None
    made = generate(plain_model(), noise_of(3, samples, (1, 8, 8)), labels, steps=1)
    pixels = made.permute(0, 2, 3, 1).numpy()
    fake, logits = read.extractor(pixels)
    np.testing.assert_array_equal(fake, made.flatten(1), "neither rounded nor clipped")
    assert made.abs().max() > 1
    assert read.classifier is not None
    real = read.extractor(np.stack(list(digit_images().read(range(1797))))).features
    assert logits is not None
    score = inception_score(logits)
    expected = {"fid": frechet_distance(real, fake)}
    if "kid" in names:
        distance = kernel_distance(real, fake)
        expected |= {"kid": distance.mean, "kid_std": distance.std}
    expected |= {"is": score.mean, "is_std": score.std} | manifold_metrics(real, fake)._asdict()
    expected["label_accuracy"] = float((read.classifier(pixels) == labels.numpy()).mean())
    assert list(row["values"]) == [name for name in expected if name.removesuffix("_std") in names], "as asked for"
    for name, value in row["values"].items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert row["values"]["fid"] > 1, "the control: such samples are no digits"


def test_samples_that_are_the_data_are_at_distance_0(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    data = torch.from_numpy(np.stack(list(digit_images().read(range(1797)))))[..., :1].permute(0, 3, 1, 2) / 127.5 - 1

    class Copies(Plain):
        """Whatever the noise, the next digits come out."""

        def forward(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
            self.calls += len(x)
            return data[self.calls - len(x) : self.calls] - x

    sampler = Sampler(plain_model(network=Copies()))
    names = ("fid", "precision", "recall", "coverage")
    (row,) = evaluated(sampler, pixels, tmp_path / "r.json", samples=1797, metrics=names)["rows"]
    assert row["values"]["fid"] == pytest.approx(0, abs=1e-6)
    assert [row["values"][name] for name in names[1:]] == [1, 1, 1]
    (row,) = evaluated(Sampler(plain_model()), pixels, tmp_path / "r.json")["rows"]
    assert row["values"]["fid"] > 1, "the control"


def test_clean_fid_itself_gives_the_same(tmp_path: Path) -> None:
    """Its own compute_fid over the saved pictures, with the same network: real clean-fid code."""
    fid = pytest.importorskip("cleanfid.fid", reason="pip install 'shortcutflow[eval]'")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.AvgPool2d(23), torch.nn.Flatten(), torch.nn.Linear(3 * 13 * 13, 12), torch.nn.Tanh()
    )
    extractor = NetworkExtractor(lambda images: network(images / 64), clean_fid_resize(299), name="small")
    protocol = EvaluationProtocol("small", "clean-fid's resize before a small network", extractor)
    real = tmp_path / "real"
    real.mkdir()
    save_pngs(np.stack(list(digit_images().read(range(40)))), real, 0)
    asked = {"samples": 40, "steps": (1, 2), "reference": real, "images": tmp_path / "images"}
    report = evaluated(Sampler(plain_model(), batch_size=23), protocol, tmp_path / "r.json", **asked)
    for row in report["rows"]:
        with torch.no_grad():
            theirs = fid.compute_fid(
                str(real), str(tmp_path / "images" / f"steps-{row['steps']}"), mode="clean", num_workers=0,
                batch_size=32, device=torch.device("cpu"), verbose=False,
                custom_feat_extractor=lambda images: network(images / 64),
            )  # fmt: skip
        assert row["values"]["fid"] == pytest.approx(theirs, rel=1e-6)
        assert theirs > 1e-3
    assert report["rows"][0]["values"]["fid"] != pytest.approx(report["rows"][1]["values"]["fid"], rel=1e-5)


def test_features_that_are_kept_serve_the_next_metric(tmp_path: Path, read: EvaluationProtocol) -> None:
    sampler, network = plain_sampler()
    first = evaluated(sampler, read, tmp_path / "r.json", keep_features=True)
    calls = network.calls
    second = evaluated(sampler, read, tmp_path / "r.json", metrics=("fid", "is"))
    assert network.calls == calls > 0
    assert second["rows"][0]["values"]["fid"] == first["rows"][0]["values"]["fid"]
    assert not (tmp_path / "evaluation-work").exists(), "without keep_features they go when the report is there"
    evaluated(sampler, read, tmp_path / "r.json", metrics=("is",))
    assert network.calls > calls


def test_features_without_class_scores_are_used_again_too(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    sampler, network = plain_sampler()
    evaluated(sampler, pixels, tmp_path / "r.json", keep_features=True)
    calls = network.calls
    evaluated(sampler, pixels, tmp_path / "r.json", metrics=("fid", "kid"), keep_features=True)
    assert network.calls == calls > 0


def plain_sampler(**settings: Any) -> tuple[Sampler, Plain]:
    network = Plain()
    return Sampler(plain_model(network=network), **settings), network


def test_a_checkpoint_that_is_damaged_or_of_other_batches_is_made_again(
    tmp_path: Path, pixels: EvaluationProtocol
) -> None:
    sampler, network = plain_sampler()
    whole = evaluated(sampler, pixels, tmp_path / "r.json", keep_features=True)
    (file,) = tmp_path.glob("evaluation-work/steps-1-*")
    for content, samples in ((file.read_bytes()[:200], 120), (file.read_bytes(), 130)):
        file.write_bytes(content)
        calls = network.calls
        again = evaluated(sampler, pixels, tmp_path / "r.json", samples=samples, keep_features=True)
        assert network.calls > calls
        assert (again["rows"][0]["values"] == whole["rows"][0]["values"]) == (samples == 120)


def test_images_that_were_not_saved_before_are_made(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    sampler, _ = plain_sampler()
    evaluated(sampler, pixels, tmp_path / "r.json", samples=20, keep_features=True)
    evaluated(sampler, pixels, tmp_path / "r.json", samples=20, images=tmp_path / "images")
    assert len(list((tmp_path / "images" / "steps-1").iterdir())) == 20


def test_whatever_changes_samples_changes_the_checkpoint() -> None:
    """Nothing stale is ever used; the batch size, the control, changes nothing."""

    class Weighted(Plain):
        """With one weight, which changes its samples or not."""

        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def key(changed: Model | None = None, steps: int = 1, **settings: Any) -> str:
        return hash_of(Sampler(changed or plain_model(), **settings).key(steps))

    other = BackboneConfig(name="plain", options={"width": 2})
    changed = [
        key(plain_model(network=Weighted(1.0))),
        key(plain_model(network=Weighted(2.0))),
        key(replace(plain_model(), config=plain_model().config.model_copy(update={"backbone": other}))),
        key(plain_model(finest_steps=64)),
        key(plain_model(flow_only=True)),
        key(plain_model(sampler="consistency")),
        key(plain_model(info=DataInfo((1, 8, 8), 5))),
        key(steps=2),
        key(seed=1),
        key(guidance_scale=1.5),
        key(precision="bfloat16"),
    ]
    assert len({key(), *changed}) == len(changed) + 1
    assert key(batch_size=7) == key()
    assert key(replace(plain_model(), name="other", folder=Path("elsewhere"))) == key()


def test_a_reference_is_reused_unless_it_is_damaged_or_its_images_change(
    tmp_path: Path, pixels: EvaluationProtocol
) -> None:
    out, sampler, real = tmp_path / "r.json", plain_sampler()[0], tmp_path / "real"
    real.mkdir()
    save_pngs(np.stack(list(digit_images().read(range(40)))), real, 0)
    first = evaluated(sampler, pixels, out, reference=real)
    (file,) = tmp_path.glob("reference-*.npz")
    assert (first["reference"]["file"], first["reference"]["reused"]) == (str(file), False)
    assert str(file) not in table_of(first)
    second = evaluated(sampler, pixels, out, reference=real)
    assert second["reference"]["reused"]
    assert f"whose statistics were reused from {file}" in table_of(second)
    assert second["rows"][0]["values"] == first["rows"][0]["values"]
    file.write_bytes(file.read_bytes()[:100])
    third = evaluated(sampler, pixels, out, reference=real)
    assert not third["reference"]["reused"], "one that is damaged is made again"
    assert third["rows"][0]["values"] == first["rows"][0]["values"]
    save_pngs(np.full((1, 8, 8, 3), 200, np.uint8), real, 7)
    fourth = evaluated(sampler, pixels, out, reference=real)
    assert not fourth["reference"]["reused"]
    assert fourth["rows"][0]["values"] != first["rows"][0]["values"]


def test_the_digits_distance_and_accuracy_are_those_of_raw_pixels(tmp_path: Path, digits: EvaluationProtocol) -> None:
    """As in docs/measured.md: pixels as sampled against scikit-learn's own, and the SVM's reading of them."""
    real, labels = load_digits()
    real = real.reshape(1797, 64)
    held_out = np.arange(1797) % 5 == 0
    classifier = SVC(C=10, gamma=0.05).fit(real[~held_out], labels[~held_out])
    pixels = torch.from_numpy(real[:120] * 1.1 + 0.02)

    class Copies(Plain):
        """Digits of high contrast, beyond [-1, 1]."""

        def forward(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
            return pixels.view(120, 1, 8, 8) - x

    report = evaluated(
        Sampler(plain_model(network=Copies())), digits, tmp_path / "r.json", metrics=("fid", "label_accuracy")
    )
    values = report["rows"][0]["values"]
    assert values["fid"] == pytest.approx(frechet_distance(pixels.numpy(), real), rel=1e-4)
    assert values["label_accuracy"] == classifier.score(pixels.numpy(), np.arange(120) % 10)
    assert 0.1 < values["label_accuracy"] < 1


class FakeAutoencoder:
    """Twice the side, three of the four channels."""

    name, sha256, downsampling = "fake", "f" * 64, 2

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_latents_are_decoded(tmp_path: Path, pixels: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def load(name: str | Path, **_: Any) -> FakeAutoencoder:
        asked_for.append(name)
        return FakeAutoencoder()

    monkeypatch.setattr(samples_module, "load_autoencoder", load)
    model = plain_model(info=DataInfo((4, 4, 4), 10, vae="theirs"))
    sampler = Sampler(model)
    with pytest.raises(ValueError, match="was trained on latents, and a reference is made of images"):
        evaluated(sampler, pixels, tmp_path / "r.json")
    report = evaluated(sampler, pixels, tmp_path / "r.json", reference="digits")
    assert report["vae"] == {"name": "fake", "sha256": "f" * 64}
    assert (report["images"]["height"], report["images"]["width"]) == (8, 8)
    Sampler(model, vae="mine")
    assert asked_for == ["theirs", "mine"]


def test_samples_that_are_not_finite_are_named(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    class Broken(Plain):
        """Sample 13 is NaN."""

        def forward(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
            made = super().forward(x, t, d, y)
            made[3, 0, 1, 1] = float("nan") if self.calls == 2 else 0.0
            return made

    with pytest.raises(ValueError, match="1 of 10 samples hold values that are not finite; the first is sample 13"):
        evaluated(Sampler(plain_model(network=Broken()), batch_size=10), pixels, tmp_path / "r.json")


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        ({"guidance_scale": 2.0}, {"null_y": None}, "was trained without labels: guidance_scale is 2.0, must be 1"),
        ({"batch_size": 0}, {}, "batch_size must be at least 1, got 0"),
        ({"precision": "float16"}, {}, "unknown precision 'float16'; known: float32, bfloat16"),
        ({"vae": "some"}, {}, "makes images, not latents: it needs no autoencoder, got some"),
        ({}, {"info": DataInfo((16, 2), None)}, r"makes no images: its samples have shape \(16, 2\)"),
        ({}, {"info": DataInfo((4, 8, 8), None)}, "makes samples of 4 channels: an image has 1 or 3"),
    ],
    ids=["guidance", "batch", "precision", "vae", "sequence", "channels"],
)
def test_a_sampler_refuses(settings: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampler(plain_model(**changes), **settings)
