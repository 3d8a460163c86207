"""Reading the cases recorded from the authors' code (tests/golden), in this library's terms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shortcutflow as sf
from backbones.dit import DiT
from shortcutflow.interop.conversion import DiTSizes, count_blocks
from shortcutflow.interop.jax_checkpoint import params_of, sizes_of
from shortcutflow.objectives import Draw
from shortcutflow.objectives.released import released_bootstrap_sizes, shortcut_rows


def from_released(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Flax parameters, flattened with '/', as a state dict of the backbone "dit" with ``released=True``."""
    sources = params_of(sizes_of({name: array.shape for name, array in params.items()}))
    return {name: source.read(lambda key: torch.from_numpy(params[key])) for name, source in sources.items()}


def to_released(state: Mapping[str, Tensor], *, patch: int) -> dict[str, np.ndarray]:
    """Such a state dict on images, or its gradients, as flax parameters."""
    width, values = state["patch_embedding.weight"].shape
    channels, labels = values // patch**2, len(state["condition.label.weight"]) - 1
    hidden = len(state["blocks.0.mlp.0.bias"])
    sizes = DiTSizes(width, count_blocks(state, "blocks."), hidden, patch, channels, channels, labels)
    params: dict[str, np.ndarray] = {}
    sources = params_of(sizes)
    assert state.keys() == sources.keys()
    for name, source in sources.items():
        for key, part in zip(source.keys, state[name].detach().float().cpu().chunk(len(source.keys)), strict=True):
            array = part.mT if key.endswith("/kernel") else part
            params[key] = array.reshape(source.shape).contiguous().numpy()
    return params


@dataclass(frozen=True)
class Recording:
    """One file: arrays by name, with the names below a prefix."""

    arrays: Mapping[str, np.ndarray]
    prefix: str = ""

    @classmethod
    @lru_cache(maxsize=4)
    def open(cls, path: Path) -> Recording:
        """The arrays are shared by all who open the file: they are for reading."""
        with np.load(path, allow_pickle=False) as z:
            return cls({name: z[name] for name in z})

    def below(self, prefix: str) -> Recording:
        return Recording(self.arrays, f"{self.prefix}{prefix}/")

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.arrays

    def array(self, name: str) -> np.ndarray:
        return self.arrays[self.prefix + name]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.array(name)))

    def images(self, name: str) -> Tensor:
        """NHWC to NCHW."""
        return self.tensor(name).permute(0, 3, 1, 2).contiguous()

    def json(self, name: str) -> dict[str, Any]:
        return json.loads(str(self.array(name)))

    def params(self, name: str = "params") -> dict[str, np.ndarray]:
        start = f"{self.prefix}{name}/"
        return {"/".join(k[len(start) :].split("/")): v for k, v in self.arrays.items() if k.startswith(start)}

    def cases(self) -> Iterator[str]:
        yield from sorted({name.split("/")[0] for name in self.arrays if name.startswith("case")})


def build(sizes: Mapping[str, Any], params: Mapping[str, np.ndarray] | None, **options: Any) -> DiT:
    """The released network of a recording's sizes, holding its parameters."""
    net = DiT(
        shape=(sizes["channels"], sizes["image_size"], sizes["image_size"]),
        num_classes=sizes["num_classes"],
        width=sizes["hidden_size"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        patch=sizes["patch_size"],
        mlp_ratio=sizes["mlp_ratio"],
        released=True,
        **options,
    )
    if params is not None:
        net.load_state_dict(from_released(params))
    return net


def flax_names(net: DiT, values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return to_released(values, patch=net.patch)


def shortcut_objective(config: Mapping[str, Any]) -> sf.ShortcutObjective:
    return sf.ShortcutObjective.released(
        denoise_timesteps=config["denoise_timesteps"],
        bootstrap_every=config["bootstrap_every"],
        bootstrap_cfg=bool(config["bootstrap_cfg"]),
        bootstrap_dt_bias=bool(config["bootstrap_dt_bias"]),
        cfg_scale=config["cfg_scale"],
        class_dropout_prob=config["class_dropout_prob"],
    )


def shortcut_draw(objective: sf.ShortcutObjective, config: Mapping[str, Any], draw: Recording) -> Draw:
    """The recorded integers and noises as this library's draw."""
    n = len(draw.array("t_int_bootstrap"))
    d = released_bootstrap_sizes(n, objective.finest_steps, bias=objective.rows == "released_dt_bias")
    t_flow = draw.tensor("t_int_flow").float() / objective.finest_steps
    if config.get("force_dt", -1) != -1:
        d = torch.full_like(d, 2.0 ** -config["force_dt"])
    t_bootstrap = draw.tensor("t_int_bootstrap").float() * d
    if config.get("force_t", -1) != -1:
        t_bootstrap, t_flow = (torch.full_like(t, config["force_t"]) for t in (t_bootstrap, t_flow))
    return shortcut_rows(
        t_bootstrap, d, draw.images("x0_bootstrap"), t_flow, draw.images("x0_flow"), draw.tensor("label_drop"),
        finest_steps=objective.finest_steps, bias=objective.rows == "released_dt_bias",
    )  # fmt: skip


def flow_draw(objective: sf.FlowMatchingObjective, config: Mapping[str, Any], draw: Recording, noise: Tensor) -> Draw:
    assert objective.time_steps is not None
    t = draw.tensor("t_int").float() / objective.time_steps
    if config.get("force_t", -1) != -1:
        t = torch.full_like(t, config["force_t"])
    return Draw(noise, t, torch.zeros_like(t), draw.tensor("label_drop"))
