"""Small random models to export, and a Python without this library to run what was exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shortcutflow.models.config import ModelConfig
from shortcutflow.network import BackboneConfig, build_network

FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "unet": {"width": 16, "multipliers": (1, 2), "stages": 1, "head_width": 8},
    "transformer": {"width": 16, "depth": 1, "heads": 2},
    "lstm": {"width": 16, "depth": 1},
    "mamba": {"width": 16, "depth": 1, "state": 4},
    "diffusers_unet": {
        "unet": {
            "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        "diffusion": {"predicts": "v"},
    },
}  # fmt: skip
"""A small network of each family; the last of them as one that undoes diffusion."""

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("shortcutflow", "backbones", "x_transformers"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
"""
"""Start of a program for which neither this library nor its networks are installed."""


def model_in(folder: Path, backbone: str | dict[str, Any] = "dit", **changes: Any) -> Path:
    """A model's folder, none of whose parameters is zero."""
    chosen = {"name": backbone, "options": FAMILIES[backbone]} if isinstance(backbone, str) else backbone
    values = {
        "backbone": BackboneConfig.model_validate(chosen), "shape": (3, 4, 4), "num_classes": 4,
        "null_y": 4, "weights": ("current",), "default_weights": "current", "step": 10,
    }  # fmt: skip
    config = ModelConfig.model_validate(values | changes)
    network = build_network(
        config.backbone, shape=config.shape, num_classes=config.num_classes, condition_shape=config.condition_shape,
        finest_steps=config.finest_steps, seed=0,
    )  # fmt: skip
    numbers = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=numbers)
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "weights.safetensors")
    config.save(folder)
    return folder


def autoencoder_in(folder: Path) -> Path:
    """A small random autoencoder's folder: latents of 4 channels, half as wide as the pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=8,
        scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    network.save_pretrained(folder)
    return folder


def noise_for(*shape: int) -> torch.Tensor:
    """Noise, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def without_this_library(program: str, *arguments: Path, cache: Path) -> None:
    """Run a program where neither this library nor the network can be reached."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + program, *map(str, arguments)],
        cwd=cache, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
