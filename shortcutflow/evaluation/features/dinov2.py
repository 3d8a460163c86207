"""DINOv2's ViT-L/14 (Oquab et al. 2023) as FD-DINOv2 uses it (Stein et al. 2023), from a safetensors file.

The network is written out here because the published way runs code from the network, and because other
implementations change the positions: at 224 pixels the published one samples its 37x37 position vectors bicubically
at a scale of 16.1 / 37 without antialias, timm with antialias.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shortcutflow.evaluation.features.extractors import BATCH_SIZE, NetworkExtractor
from shortcutflow.evaluation.features.resize import clean_fid_resize
from shortcutflow.evaluation.features.weights_files import HeldFile, PublishedFile, weights_of

DINOV2 = PublishedFile(
    name="dinov2-vit-large-patch14.safetensors",
    url="https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
    publisher="timm's authors, from Meta's DINOv2 ViT-L/14 without registers",
    sha256=None,
    largest=2 * 2**30,
)
SIZE, PATCH = 224, 14
HEAD_WIDTH = 64
OFFSET = 0.1
"""Added to the number of patches when positions are resampled: the published network's guard against rounding."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Attention and an MLP, each after a norm, scaled by channel and added; (b, tokens, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1 = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(width))})
        self.ls2 = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(width))})
        self._heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(b, tokens, 3, self._heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, tokens, width)
        x = x + self.ls1["gamma"] * self.attn["proj"](attended)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DinoV2(nn.Module):
    """Normalised images (b, 3, h, w), sides multiples of 14, to the class token's features (b, width).

    The parameters have the names of the published file.

    Args:
        width: of a token; heads are 64 wide.
        depth: number of blocks.
        places: position vectors along a side, 37 in the published file.
    """

    def __init__(self, width: int = 1024, depth: int = 24, places: int = 37) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + places**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList([Block(width, width // HEAD_WIDTH) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._places = places

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        h, w = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        x = tokens + self.positions(h, w)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def positions(self, h: int, w: int) -> Tensor:
        """Position vectors (1, 1 + h w, width) of h x w patches, resampled as the published network does."""
        if (h, w) == (self._places, self._places):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self._places, self._places)).permute(0, 3, 1, 2)
        scale = ((h + OFFSET) / self._places, (w + OFFSET) / self._places)
        resampled = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([self.pos_embed[:, :1], resampled.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_dinov2(file: HeldFile) -> DinoV2:
    """The network from safetensors, of whatever width and depth the file has; ValueError if it holds none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(file.content)
    except SafetensorError as error:
        raise ValueError(f"{file.path} is no safetensors file ({error}); pickled weights are never loaded") from error
    tensors.pop("mask_token", None)  # of training alone
    try:
        _, tokens, width = tensors["pos_embed"].shape
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        network = DinoV2(width, depth, places=round((tokens - 1) ** 0.5))
        network.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file.path} does not hold DINOv2's ViT without registers: {reason}") from error
    return network.float().eval().requires_grad_(False)


def dinov2_extractor(
    *, device: torch.device | str = "cpu", weights: Path | None = None, batch_size: int = BATCH_SIZE
) -> NetworkExtractor:
    """The features of FD-DINOv2: 8-bit bicubic resize to 224, ImageNet's normalisation, the class token.

    Errors are those of :func:`shortcutflow.evaluation.features.protocols.open_protocol`.
    """
    resize = clean_fid_resize(SIZE, quantize=True)
    file = weights_of(DINOV2, weights)
    network = load_dinov2(file).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    return NetworkExtractor(
        lambda pixels: network((pixels / 255 - mean) / std), resize, name=f"dinov2 vit-l/14 sha256:{file.sha256}",
        device=device, batch_size=batch_size,
    )  # fmt: skip
