"""The Inception network of FID, from the one TorchScript file that clean-fid, StyleGAN and others read.

The file is a translation of TensorFlow's ``inception-2015-12-05``. Called as a whole it resizes as TensorFlow 1 did;
its ``layers`` alone take pictures that are resized already, in (x - 128) / 128. Its 2048 pooled features make FID, the
classifier on them without its bias the Inception score, and seven channels of ``mixed_6`` the spatial FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shortcutflow.evaluation.features.extractors import BATCH_SIZE, NetworkExtractor
from shortcutflow.evaluation.features.resize import (
    Prepare,
    clean_fid_resize,
    default_workers,
    on_threads,
    plain_bilinear,
    tensorflow_bilinear,
    unresized,
)
from shortcutflow.evaluation.features.torchscript import load_torchscript
from shortcutflow.evaluation.features.weights_files import PublishedFile, weights_of

INCEPTION = PublishedFile(
    name="inception-2015-12-05.pt",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    publisher="NVIDIA, with StyleGAN2-ADA",
    # Of 95,607,719 bytes; as in k-diffusion's k_diffusion/evaluation.py.
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    largest=2**28,
    also_at=(Path("/tmp/inception-2015-12-05.pt"),),  # where clean-fid keeps it
)
SIZE = 299
SPATIAL_CHANNELS = 7


class Inception:
    """The network's parts by the names of the file.

    Args:
        module: the loaded file; what it lacks is told when it is used.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        if not hasattr(module, "layers"):
            raise ValueError(f"the file of weights is no {INCEPTION.name}: it has no part named 'layers'")

    def clean_fid(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of pictures (b, 3, 299, 299) in [0, 255]: what clean-fid's own wrapper computes."""
        return self._of_layers((pixels - 128) / 128)

    def released_code(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of pictures (b, 3, h, w) uint8: to [-1, 1], bilinear without antialias, clipped."""
        return self._of_layers(plain_bilinear(pixels.float() / 127.5 - 1, SIZE).clamp(-1, 1))

    def adm(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of pictures (b, 3, h, w) uint8: the file's own resize, which is that of TensorFlow 1."""
        features = self._module(pixels.float(), return_features=True).flatten(1)
        return features, self._logits(features)

    def adm_spatial(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of pictures (b, 3, h, w) uint8: 7 channels of 17x17 places, in TensorFlow's order (place, channel)."""
        x = (tensorflow_bilinear(pixels.float(), SIZE) - 128) / 128
        for name, layer in self._module.layers.named_children():
            if name == "mixed_6":
                return layer.conv(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), None
            x = layer(x)
        raise ValueError(f"the file of weights is no {INCEPTION.name}: it has no layer named 'mixed_6'")

    def _of_layers(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self._module.layers(x).flatten(1)
        return features, self._logits(features)

    def _logits(self, features: Tensor) -> Tensor | None:
        # Without its bias, as the original score had it.
        weight = getattr(getattr(self._module, "output", None), "weight", None)
        return None if weight is None else F.linear(features, weight)


def inception_extractor(
    protocol: str,
    *,
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    batch_size: int = BATCH_SIZE,
    resize_workers: int | None = None,
) -> NetworkExtractor:
    """Inception as one of "clean-fid", "released-code", "adm" and "adm-spatial" uses it.

    Raises:
        OSError: if the weights are nowhere and cannot be fetched.
        ValueError: if a file is not what it should be.
        ImportError: if clean-fid is asked for and is not installed.
    """
    prepare: Prepare = unresized
    if protocol == "clean-fid":
        prepare = on_threads(clean_fid_resize(SIZE), resize_workers or default_workers())
    file = weights_of(INCEPTION, weights)
    inception = Inception(load_torchscript(file, device))
    networks = {
        "clean-fid": inception.clean_fid,
        "released-code": inception.released_code,
        "adm": inception.adm,
        "adm-spatial": inception.adm_spatial,
    }
    note = "" if file.sha256 == INCEPTION.sha256 else " (not the published file)"
    return NetworkExtractor(
        networks[protocol], prepare, name=f"inception 2015-12-05 ({protocol}) sha256:{file.sha256}{note}",
        device=device, batch_size=batch_size,
    )  # fmt: skip
