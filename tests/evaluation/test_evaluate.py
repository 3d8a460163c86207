"""The driver of evaluations: the numbers, the report, what is used again, and one clear line for every mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shortcutflow.data.source import DataInfo
from shortcutflow.evaluation import samples as samples_module
from shortcutflow.evaluation.distances.frechet import frechet_distance
from shortcutflow.evaluation.distances.inception_score import inception_score
from shortcutflow.evaluation.distances.kernel_distance import kernel_distance
from shortcutflow.evaluation.distances.manifold import manifold_metrics
from shortcutflow.evaluation.drawing.grids import to_uint8
from shortcutflow.evaluation.evaluate import Asked, evaluate, parts_folder
from shortcutflow.evaluation.features.extractors import Extracted, Extractor, extractor_of_module
from shortcutflow.evaluation.features.protocols import EvaluationProtocol, open_protocol
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.evaluation.measures import METRICS
from shortcutflow.evaluation.pictures import DigitPictures, save_pngs
from shortcutflow.evaluation.probe import Probe
from shortcutflow.evaluation.report import table_of
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.evaluation.subject import Subject
from tests.evaluation.evaluating import Plain, plain_subject

ALL = tuple(METRICS)


@pytest.fixture(scope="module")
def digits() -> EvaluationProtocol:
    return open_protocol("digits")


@pytest.fixture(scope="module")
def pixels() -> EvaluationProtocol:
    return open_protocol("pixels")


PROBE = Probe(8, 8, [0.0])


def evaluated(sampler: Sampler, protocol: EvaluationProtocol, out: Path, **asked: Any) -> dict[str, Any]:
    report = evaluate(sampler, protocol, replace(Asked(steps=(1,), samples=120), **asked), out)
    assert report is not None
    return report


@pytest.mark.parametrize(("samples", "names"), [(150, ALL), (1100, ("fid", "is", "density"))], ids=["one", "parts"])
def test_values_are_those_of_the_functions(
    tmp_path: Path, digits: EvaluationProtocol, samples: int, names: tuple[str, ...]
) -> None:
    """Parts, batches and files change nothing."""
    sampler = Sampler(plain_subject(), seed=3, batch_size=64)
    (row,) = evaluated(sampler, digits, tmp_path / "r.json", samples=samples, metrics=names)["rows"]
    made = generate(Plain(), noise_of(3, samples, (1, 8, 8)), labels_of(samples, 10), steps=1)
    fake, logits = digits.extractor(to_uint8(made))
    real = digits.extractor(np.stack(list(DigitPictures().read(range(1797))))).features
    assert logits is not None
    score = inception_score(logits)
    expected = {"fid": frechet_distance(real, fake)}
    if "kid" in names:
        distance = kernel_distance(real, fake)
        expected |= {"kid": distance.mean, "kid_std": distance.std}
    expected |= {"is": score.mean, "is_std": score.std} | manifold_metrics(real, fake)._asdict()
    assert list(row["values"]) == [name for name in expected if name.removesuffix("_std") in names], "as asked for"
    for name, value in row["values"].items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert row["values"]["fid"] > 1, "the control: such samples are no digits"


def test_samples_that_are_the_data_are_at_distance_0(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    data = torch.from_numpy(np.stack(list(DigitPictures().read(range(1797)))))[..., :1].permute(0, 3, 1, 2) / 127.5 - 1

    class Copies(Plain):
        """Whatever the noise, the next digits come out."""

        def __call__(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
            self.calls += len(x)
            return data[self.calls - len(x) : self.calls] - x

    sampler = Sampler(plain_subject(network=Copies()))
    names = ("fid", "precision", "recall", "coverage")
    (row,) = evaluated(sampler, pixels, tmp_path / "r.json", samples=1797, metrics=names)["rows"]
    assert row["values"]["fid"] == pytest.approx(0, abs=1e-6)
    assert [row["values"][name] for name in names[1:]] == [1, 1, 1]
    (row,) = evaluated(Sampler(plain_subject()), pixels, tmp_path / "r.json")["rows"]
    assert row["values"]["fid"] > 1, "the control"


def test_clean_fid_itself_gives_the_same(tmp_path: Path) -> None:
    """Its own compute_fid over the saved pictures, with the same network: real clean-fid code."""
    fid = pytest.importorskip("cleanfid.fid", reason="pip install 'shortcutflow[eval]'")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.AvgPool2d(23), torch.nn.Flatten(), torch.nn.Linear(3 * 13 * 13, 12), torch.nn.Tanh()
    )
    extractor = extractor_of_module(lambda images: network(images / 64), name="small", size=299)
    protocol = EvaluationProtocol("small", "clean-fid's resize before a small network", extractor)
    real = tmp_path / "real"
    real.mkdir()
    save_pngs(np.stack(list(DigitPictures().read(range(40)))), real, 0)
    asked = {"samples": 40, "steps": (1, 2), "reference": real, "images": tmp_path / "images"}
    report = evaluated(Sampler(plain_subject(), batch_size=23), protocol, tmp_path / "r.json", **asked)
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


def test_features_that_are_kept_serve_the_next_metric(tmp_path: Path, digits: EvaluationProtocol) -> None:
    sampler, network = plain_sampler()
    first = evaluated(sampler, digits, tmp_path / "r.json", keep_features=True)
    calls = network.calls
    second = evaluated(sampler, digits, tmp_path / "r.json", metrics=("fid", "is"))
    assert network.calls == calls > 0
    assert second["rows"][0]["values"]["fid"] == first["rows"][0]["values"]["fid"]
    assert not (tmp_path / "evaluation-work").exists(), "without keep_features they go when the report is there"
    evaluated(sampler, digits, tmp_path / "r.json", metrics=("is",))
    assert network.calls > calls


def plain_sampler(**settings: Any) -> tuple[Sampler, Plain]:
    network = Plain()
    return Sampler(plain_subject(network=network), **settings), network


def test_more_samples_keep_whole_parts(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    """The last part of 1,100 is not that of 1,200; the first is."""
    sampler, network = plain_sampler(batch_size=100)
    evaluated(sampler, pixels, tmp_path / "r.json", samples=1100, keep_features=True)
    assert network.calls == 11
    evaluated(sampler, pixels, tmp_path / "r.json", samples=1200, keep_features=True)
    assert network.calls == 13
    fresh = evaluated(plain_sampler(batch_size=100)[0], pixels, tmp_path / "r.json", samples=1200)
    again = evaluated(sampler, pixels, tmp_path / "r.json", samples=1200)
    assert fresh["rows"][0]["values"] == again["rows"][0]["values"]


def test_a_damaged_part_is_made_again(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    sampler, network = plain_sampler()
    whole = evaluated(sampler, pixels, tmp_path / "r.json", keep_features=True)
    (part,) = tmp_path.glob("evaluation-work/*/part-*")
    part.write_bytes(part.read_bytes()[:200])
    calls = network.calls
    assert evaluated(sampler, pixels, tmp_path / "r.json")["rows"][0]["values"] == whole["rows"][0]["values"]
    assert network.calls > calls


def test_images_that_were_not_saved_before_are_made(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    sampler, _ = plain_sampler()
    evaluated(sampler, pixels, tmp_path / "r.json", samples=20, keep_features=True)
    evaluated(sampler, pixels, tmp_path / "r.json", samples=20, images=tmp_path / "images")
    assert len(list((tmp_path / "images" / "steps-1").iterdir())) == 20


def test_whatever_changes_samples_changes_the_folder(pixels: EvaluationProtocol, digits: EvaluationProtocol) -> None:
    """No stale part is ever used; batch and count, the control, change nothing."""
    subject, out = plain_subject(), Path("r.json")

    def place(
        changed: Subject = subject, protocol: EvaluationProtocol = pixels, steps: int = 1, **settings: Any
    ) -> Path:
        return parts_folder(Sampler(changed, **settings), protocol, steps, out, PROBE).path

    changed = [
        place(replace(subject, identity={"network": "plain", "weights_sha256": "1"})),
        place(replace(subject, identity={"network": "plain", "weights_sha256": "2"})),
        place(replace(subject, finest_steps=64)),
        place(replace(subject, flow_only=True)),
        place(replace(subject, sampler="consistency")),
        place(replace(subject, info=DataInfo((1, 8, 8), 5))),
        place(steps=2),
        place(seed=1),
        place(guidance_scale=1.5),
        place(precision="bfloat16"),
        place(protocol=digits),
    ]
    assert len({place(), *changed}) == len(changed) + 1
    assert place(batch_size=7) == place()
    assert place(replace(subject, name="other", folder=Path("elsewhere"))) == place()


def test_another_evaluation_of_the_same_samples_is_kept_out(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    sampler, _ = plain_sampler()
    with (
        parts_folder(sampler, pixels, 1, tmp_path / "r.json", PROBE).held(),
        pytest.raises(ValueError, match="another evaluation of the same samples is at work"),
    ):
        evaluated(sampler, pixels, tmp_path / "r.json")


class Counted:
    """A protocol's extractor whose calls with one picture are counted, and whose features may be scaled."""

    name = "counted"

    def __init__(self, inner: Extractor) -> None:
        self.inner, self.probes, self.factor = inner, 0, np.float32(1)

    def __call__(self, images: np.ndarray) -> Extracted:
        self.probes += len(images) == 1
        found = self.inner(images)
        return found._replace(features=found.features * self.factor)


def test_the_extractor_is_probed_once_and_another_one_makes_all_again(
    tmp_path: Path, pixels: EvaluationProtocol
) -> None:
    counted = Counted(pixels.extractor)
    protocol, out = replace(pixels, extractor=counted), tmp_path / "r.json"
    sampler, network = plain_sampler()

    def again(factor: float) -> tuple[int, bool, dict[str, Any]]:
        counted.probes, counted.factor, network.calls = 0, np.float32(factor), 0
        report = evaluated(sampler, protocol, out, steps=(1, 2), keep_features=True)
        assert counted.probes == 1
        return network.calls, report["reference"]["kept_from_before"], report

    calls, kept, first = again(1.0)
    assert calls > 0
    assert not kept
    (file,) = tmp_path.glob("reference-*.npz")
    assert first["reference"]["file"] == str(file)
    assert str(file) not in table_of(first)
    calls, kept, second = again(1.004)  # as another device would
    assert (calls, kept) == (0, True)
    assert f"by the statistics that {file} kept from before" in table_of(second)
    assert second["rows"][0]["values"] == first["rows"][0]["values"]
    calls, kept, third = again(2.0)
    assert calls > 0
    assert not kept
    assert third["rows"][0]["values"]["fid"] == pytest.approx(4 * first["rows"][0]["values"]["fid"], rel=1e-5)
    assert list(tmp_path.glob("reference-*.npz")) == [file]
    file.write_bytes(file.read_bytes()[:100])
    calls, kept, fourth = again(2.0)
    assert (calls, kept) == (0, False), "one that is damaged is made again"
    assert fourth["rows"][0]["values"] == third["rows"][0]["values"]


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
    subject = replace(plain_subject(), info=DataInfo((4, 4, 4), 10, vae="theirs"))
    sampler = Sampler(subject)
    with pytest.raises(ValueError, match="was trained on latents, and a reference is made of pictures"):
        evaluated(sampler, pixels, tmp_path / "r.json")
    report = evaluated(sampler, pixels, tmp_path / "r.json", reference="digits")
    assert report["vae"] == {"name": "fake", "sha256": "f" * 64}
    assert (report["pictures"]["height"], report["pictures"]["width"]) == (8, 8)
    Sampler(subject, vae="mine")
    assert asked_for == ["theirs", "mine"]


def test_samples_that_are_not_finite_are_named(tmp_path: Path, pixels: EvaluationProtocol) -> None:
    class Broken(Plain):
        """Sample 13 is NaN."""

        def __call__(self, x: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
            made = super().__call__(x, t, d, y)
            made[3, 0, 1, 1] = float("nan") if self.calls == 2 else 0.0
            return made

    with pytest.raises(ValueError, match="1 of 10 samples hold values that are not finite; the first is sample 13"):
        evaluated(Sampler(plain_subject(network=Broken()), batch_size=10), pixels, tmp_path / "r.json")


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        ({"guidance_scale": 2.0}, {"null_y": None}, "was trained without labels: guidance_scale is 2.0, must be 1"),
        ({"batch_size": 0}, {}, "batch_size must be at least 1, got 0"),
        ({"precision": "float16"}, {}, "unknown precision 'float16'; known: float32, bfloat16"),
        ({"vae": "some"}, {}, "makes pictures, not latents: it needs no autoencoder, got some"),
        ({}, {"info": DataInfo((16, 2), None)}, r"makes no pictures: its samples have shape \(16, 2\)"),
        ({}, {"info": DataInfo((4, 8, 8), None)}, "makes samples of 4 channels: a picture has 1 or 3"),
    ],
    ids=["guidance", "batch", "precision", "vae", "sequence", "channels"],
)
def test_a_sampler_refuses(settings: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampler(replace(plain_subject(), **changes), **settings)
