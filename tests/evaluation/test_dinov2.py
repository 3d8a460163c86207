"""DINOv2 as written out here against timm's network, and its positions against their definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save, save_file

from shortcutflow.evaluation.features.dinov2 import DinoV2, load_dinov2
from shortcutflow.evaluation.features.protocols import open_protocol
from shortcutflow.evaluation.features.weights_files import HeldFile, read_file
from tests.evaluation.test_resize import as_tensor, pictures


def small_network(places: int = 5) -> DinoV2:
    """Two blocks of two heads with random weights."""
    network = DinoV2(width=128, depth=2, places=places)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def test_equals_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer", reason="another implementation to compare with")
    ours = small_network(places=4)
    theirs = timm.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1e-5, num_classes=0
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        assert not torch.allclose(ours(images), theirs(-images), atol=1e-2)


def bicubic_by_hand(line: np.ndarray, count: int, scale: float) -> np.ndarray:
    """Values (n,) sampled at (i + 1/2) / scale - 1/2 by the cubic of a = -0.75, edges repeated."""
    a, out = -0.75, np.zeros(count)
    for i in range(count):
        place = (i + 0.5) / scale - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - k)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            out[i] += (near if x <= 1 else far) * line[min(max(k, 0), len(line) - 1)]
    return out


def test_positions_are_resampled_as_published() -> None:
    network = DinoV2(width=64, depth=0)
    column = np.random.default_rng(0).normal(size=37)
    with torch.no_grad():
        network.pos_embed[:, 0] = 9
        network.pos_embed[:, 1:] = torch.from_numpy(np.tile(column, 37)).view(1, -1, 1)
        found = network.positions(16, 16)
    assert found.shape == (1, 257, 64)
    assert (found[:, 0] == 9).all()
    grid = found[0, 1:].view(16, 16, 64)
    np.testing.assert_allclose(grid[3, :, 0].detach(), bicubic_by_hand(column, 16, 16.1 / 37), atol=1e-4)
    without_offset = bicubic_by_hand(column, 16, 16 / 37)
    assert np.abs(grid[3, :, 0].detach().numpy() - without_offset).max() > 1e-2, "the offset must show"
    assert torch.equal(network.positions(37, 37), network.pos_embed)


def test_protocol_from_a_file(tmp_path: Path) -> None:
    network, images = small_network(places=37), pictures(3, 300, 260)
    weights = dict(network.state_dict()) | {"mask_token": torch.zeros(1, 128)}
    save_file(weights, tmp_path / "vit.safetensors")
    protocol = open_protocol("dinov2", weights=tmp_path / "vit.safetensors")
    assert read_file(tmp_path / "vit.safetensors", 10**9).sha256 in protocol.extractor.name
    # As dgm-eval does: Pillow's bicubic of the 8-bit picture, then ImageNet's normalisation.
    small = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = network(x)
        by_others = F.interpolate(as_tensor(images) / 255, (224, 224), mode="bilinear")
        other = network((by_others - 0.45) / 0.226)
    features = protocol.extractor(images).features
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert np.abs(features - other.numpy()).max() > 2e-3


def test_wrong_files(tmp_path: Path) -> None:
    torch.save(small_network().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"no safetensors file .* pickled weights are never loaded"):
        open_protocol("dinov2", weights=tmp_path / "vit.pth")
    weights = dict(small_network().state_dict())
    lacking = {name: tensor for name, tensor in weights.items() if name != "blocks.1.ls2.gamma"}
    for tensors, says in (
        (lacking, "blocks.1.ls2.gamma"),
        (weights | {"register_tokens": torch.zeros(1, 4, 128)}, "without registers: .*register_tokens"),
        ({"a": torch.zeros(3)}, "pos_embed"),
    ):
        with pytest.raises(ValueError, match=says):
            load_dinov2(HeldFile(tmp_path / "vit.safetensors", save(tensors), ""))
