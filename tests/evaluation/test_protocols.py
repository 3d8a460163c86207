"""Protocols from files with the interface of the published ones: clean-fid's own code must find the same features."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import Tensor

from shortcutflow.evaluation.features.protocols import DESCRIPTIONS, check_protocol, open_protocol
from tests.evaluation.inception_standin import InceptionStandIn, save_torchscript
from tests.evaluation.test_extractors import SmallNetwork
from tests.evaluation.test_resize import as_tensor, pictures

INCEPTIONS = ("clean-fid", "released-code", "adm", "adm-spatial")


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_torchscript(InceptionStandIn(), tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return pictures(6, 48, 40)


@pytest.fixture(scope="module")
def folder(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("name", "mode"), [("clean-fid", "clean"), ("adm", "legacy_tensorflow")])
def test_features_are_those_of_clean_fids_own_code(
    name: str, mode: str, standin: Path, images: np.ndarray, folder: Path
) -> None:
    wrapper = InceptionV3W(str(standin.parent), download=False, resize_inside=mode == "legacy_tensorflow")
    theirs = fid.get_folder_features(
        str(folder), wrapper, num_workers=0, batch_size=4, device=torch.device("cpu"), mode=mode, verbose=False
    )
    extractor = open_protocol(name, weights=standin).extractor
    np.testing.assert_allclose(extractor(images).features, theirs, atol=1e-6)


def test_released_code_by_its_formula(standin: Path, images: np.ndarray) -> None:
    x = as_tensor(images) / 127.5 - 1
    x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False, antialias=False).clamp(-1, 1)
    with torch.no_grad():
        expected = InceptionStandIn().layers(x).flatten(1)
    features = open_protocol("released-code", weights=standin).extractor(images).features
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_spatial_features_are_the_networks_own(standin: Path, images: np.ndarray) -> None:
    network, seen = InceptionStandIn(), list[Tensor]()
    network.layers.mixed_6.conv.register_forward_hook(lambda *passed: seen.append(passed[2]))
    with torch.no_grad():
        network(as_tensor(images))
    features = open_protocol("adm-spatial", weights=standin).extractor(images).features
    expected = seen[0][:, :7].permute(0, 2, 3, 1)
    assert features.shape == (6, 17 * 17 * 7)
    np.testing.assert_allclose(features, expected.flatten(1), atol=1e-4)


def test_protocols_differ_on_the_same_pictures(standin: Path, images: np.ndarray) -> None:
    features = [open_protocol(name, weights=standin).extractor(images).features for name in INCEPTIONS[:3]]
    for i, a in enumerate(features):
        for b in features[:i]:
            assert np.abs(a - b).max() > 1e-3


def test_logits_are_without_bias(standin: Path, images: np.ndarray) -> None:
    network = InceptionStandIn()
    for name in INCEPTIONS[:3]:
        features, logits = open_protocol(name, weights=standin).extractor(images)
        assert logits is not None
        expected = features @ network.output.weight.detach().numpy().T
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert np.abs(network.output.bias.detach().numpy()).max() > 1e-3, "a bias would show"
    assert open_protocol("adm-spatial", weights=standin).extractor(images).logits is None


def test_other_weights_are_named(standin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        protocol = open_protocol("adm", weights=standin)
    assert "is not the published inception-2015-12-05.pt" in caplog.text
    other = open_protocol("adm", weights=save_torchscript(InceptionStandIn(seed=1), tmp_path / "b.pt"))
    assert "(not the published file)" in protocol.extractor.name
    assert other.extractor.name != protocol.extractor.name
    names = {open_protocol(name, weights=standin).extractor.name for name in INCEPTIONS}
    assert len(names) == 4, "the name tells the protocols apart too"


def test_a_file_that_is_no_inception(tmp_path: Path) -> None:
    file = save_torchscript(SmallNetwork(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="it has no part named 'layers'"):
        open_protocol("clean-fid", weights=file)


def test_names(tmp_path: Path) -> None:
    assert tuple(DESCRIPTIONS) == ("clean-fid", "released-code", "adm", "adm-spatial", "dinov2", "pixels", "digits")
    for wrong in ("clean_fid", "", "file:"):
        with pytest.raises(ValueError, match="known: clean-fid, released-code, adm"):
            open_protocol(wrong)
    with pytest.raises(ValueError, match="the protocol pixels takes no weights"):
        open_protocol("pixels", weights=tmp_path / "w.pt")
    check_protocol("file:x.pt")


def test_protocols_without_weights(tmp_path: Path) -> None:
    images = pictures(3, 8, 8)
    for name, width in (("pixels", 192), ("digits", 64)):
        protocol = open_protocol(name)
        assert (protocol.name, protocol.extractor(images).features.shape) == (name, (3, width))
        assert len(protocol.description) > 20
    file = save_torchscript(SmallNetwork(), tmp_path / "net.pt")
    protocol = open_protocol(f"file:{file}")
    assert protocol.name == "file:net.pt"
    assert str(tmp_path) not in f"{protocol.name} {protocol.description} {protocol.extractor.name}"
    assert protocol.extractor(images).features.shape == (3, 12)


def test_clean_fid_missing(monkeypatch: pytest.MonkeyPatch, standin: Path) -> None:
    monkeypatch.setitem(sys.modules, "cleanfid.resize", None)
    with pytest.raises(ImportError, match=r"pip install 'shortcutflow\[eval\]'"):
        open_protocol("clean-fid", weights=standin)
    open_protocol("adm", weights=standin)


def test_importing_protocols_is_light() -> None:
    code = (
        "import sys, shortcutflow.evaluation.features.protocols as p; p.DESCRIPTIONS; "
        "print([m for m in ('cleanfid', 'torchvision', 'scipy', 'sklearn', 'PIL', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
