"""The released shortcut code's DiT parameters, by their flax names, to and from this DiT's.

Names and layouts: dense kernels are (in, out); a block's Dense_1, Dense_2 and Dense_3 are key, query and value; the
patch convolution's kernel is (row, column, in, out); the final channels of a patch are ordered (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_LINEAR = {
    "TimestepEmbedder_0/Dense_0": "condition.time.hidden",
    "TimestepEmbedder_0/Dense_1": "condition.time.out",
    "TimestepEmbedder_1/Dense_0": "condition.step.hidden",
    "TimestepEmbedder_1/Dense_1": "condition.step.out",
    "FinalLayer_0/Dense_0": "head.modulation",
    "FinalLayer_0/Dense_1": "head.out",
    "PatchEmbed_0/Conv_0": "patch_embedding",
}
_BLOCK_LINEAR = {
    "Dense_0": "modulation",
    "Dense_4": "mixer.out",
    "MlpBlock_0/Dense_0": "mlp.0",
    "MlpBlock_0/Dense_1": "mlp.2",
}
_TABLE = {"LabelEmbedder_0/Embed_0/embedding": "condition.label.weight", "Embed_0/embedding": "log_variances"}
_QKV = ("Dense_2", "Dense_1", "Dense_3")


def from_released(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Flax parameters, flattened with '/', as a state dict of ``DiT(released=True)``.

    Raises:
        ValueError: naming parameters that are unknown or missing.
    """
    left = dict(params)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"parameter {name!r} is missing; there are {', '.join(sorted(params)[:8])}, ...")
        return torch.from_numpy(np.array(left.pop(name), dtype=np.float32))

    def linear(name: str) -> tuple[Tensor, Tensor]:
        kernel = take(f"{name}/kernel")
        return kernel.flatten(0, -2).T.contiguous(), take(f"{name}/bias")

    state: dict[str, Tensor] = {}
    for theirs, ours in _linear_names(params).items():
        state[f"{ours}.weight"], state[f"{ours}.bias"] = linear(theirs)
    for i in range(_depth(params)):
        parts = [linear(f"DiTBlock_{i}/{name}") for name in _QKV]
        state[f"blocks.{i}.mixer.qkv.weight"] = torch.cat([weight for weight, _ in parts])
        state[f"blocks.{i}.mixer.qkv.bias"] = torch.cat([bias for _, bias in parts])
    for theirs, ours in _TABLE.items():
        state[ours] = take(theirs)
    if left:
        raise ValueError(f"unknown parameters: {', '.join(sorted(left))}")
    return state


def to_released(state: Mapping[str, Tensor], *, patch: int) -> dict[str, np.ndarray]:
    """A state dict of ``DiT(released=True)`` on images, or its gradients, as flattened flax parameters."""
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    params: dict[str, np.ndarray] = {}

    def put(name: str, weight: Tensor, bias: Tensor) -> None:
        kernel = weight.detach().float().cpu().T
        if name == "PatchEmbed_0/Conv_0":
            kernel = kernel.reshape(patch, patch, -1, kernel.shape[-1])
        params[f"{name}/kernel"] = kernel.contiguous().numpy()
        params[f"{name}/bias"] = bias.detach().float().cpu().numpy()

    for theirs, ours in _linear_names({f"DiTBlock_{i}/" for i in blocks}).items():
        put(theirs, state[f"{ours}.weight"], state[f"{ours}.bias"])
    for i in blocks:
        weights = state[f"blocks.{i}.mixer.qkv.weight"].chunk(3)
        biases = state[f"blocks.{i}.mixer.qkv.bias"].chunk(3)
        for name, weight, bias in zip(_QKV, weights, biases, strict=True):
            put(f"DiTBlock_{i}/{name}", weight, bias)
    for theirs, ours in _TABLE.items():
        params[theirs] = state[ours].detach().float().cpu().numpy()
    return params


def _depth(names: Mapping[str, np.ndarray] | set[str]) -> int:
    return len({name.split("/")[0] for name in names if name.startswith("DiTBlock_")})


def _linear_names(names: Mapping[str, np.ndarray] | set[str]) -> dict[str, str]:
    """Their name to ours, of every dense layer but queries, keys and values."""
    found = dict(_LINEAR)
    for i in range(_depth(names)):
        found |= {f"DiTBlock_{i}/{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK_LINEAR.items()}
    return found
