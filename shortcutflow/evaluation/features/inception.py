"""The Inception network of FID, from the one TorchScript file that clean-fid, StyleGAN and others read.

The file is a translation of TensorFlow's ``inception-2015-12-05``. Called as a whole it resizes as TensorFlow 1 did;
its ``layers`` alone take images that are resized already, in (x - 128) / 128. Its 2048 pooled features make FID, the
classifier on them without its bias the Inception score, and seven channels of ``mixed_6`` the spatial FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shortcutflow.evaluation.features.extractors import BATCH_SIZE, NetworkExtractor, load_torchscript
from shortcutflow.evaluation.features.resize import clean_fid_resize, plain_bilinear, tensorflow_bilinear, unresized
from shortcutflow.evaluation.features.weights_files import PublishedFile, weights_of

INCEPTION = PublishedFile(
    name="inception-2015-12-05.pt",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    publisher="NVIDIA, with StyleGAN2-ADA",
    # Of 95,607,719 bytes; as in k-diffusion's k_diffusion/evaluation.py.
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    largest=2**28,
    also_at=Path("/tmp/inception-2015-12-05.pt"),  # where clean-fid keeps it
)
SIZE = 299
SPATIAL_CHANNELS = 7


def inception_features(protocol: str, module: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features and logits of images as the protocol's ``prepare`` made them.

    Args:
        protocol: "clean-fid" takes (b, 3, 299, 299) in [0, 255]; "released-code", "adm" and "adm-spatial" take
            (b, 3, h, w) uint8.
        module: the loaded file.
        images: of that kind.

    Returns:
        (b, 2048) and (b, 1008), or (b, 2023) and None for "adm-spatial": 7 channels of 17x17 places, in TensorFlow's
        order (place, channel).
    """
    if protocol == "adm-spatial":
        x = (tensorflow_bilinear(images.float(), SIZE) - 128) / 128
        for name, layer in module.layers.named_children():
            if name == "mixed_6":
                return layer.conv(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), None
            x = layer(x)
        raise ValueError(f"the file of weights is no {INCEPTION.name}: it has no layer named 'mixed_6'")
    if protocol == "adm":  # the file's own resize, which is that of TensorFlow 1
        features = module(images.float(), return_features=True).flatten(1)
    elif protocol == "released-code":
        resized = plain_bilinear(images.float() / 127.5 - 1, SIZE).clamp(-1, 1)
        features = module.layers(resized).flatten(1)
    else:  # what clean-fid's own wrapper computes
        features = module.layers((images - 128) / 128).flatten(1)
    # Without its bias, as the original score had it.
    weight = getattr(getattr(module, "output", None), "weight", None)
    return features, None if weight is None else F.linear(features, weight)


def inception_extractor(
    protocol: str, *, device: torch.device | str = "cpu", weights: Path | None = None, batch_size: int = BATCH_SIZE
) -> NetworkExtractor:
    """Inception as one of "clean-fid", "released-code", "adm" and "adm-spatial" uses it.

    Errors are those of :func:`shortcutflow.evaluation.features.protocols.open_protocol`.
    """
    prepare = clean_fid_resize(SIZE) if protocol == "clean-fid" else unresized
    file = weights_of(INCEPTION, weights)
    module = load_torchscript(file, device)
    if not hasattr(module, "layers"):
        raise ValueError(f"the file of weights is no {INCEPTION.name}: it has no part named 'layers'")
    note = "" if file.sha256 == INCEPTION.sha256 else " (not the published file)"
    return NetworkExtractor(
        lambda images: inception_features(protocol, module, images), prepare,
        name=f"inception 2015-12-05 ({protocol}) sha256:{file.sha256}{note}", device=device, batch_size=batch_size,
    )  # fmt: skip
