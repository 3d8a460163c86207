"""Checkpoints as the released code writes them, of any size, without JAX: by Python's own pickler and stand-in classes.

The classes have the names and modules of optax's and flax's; a pickler that writes names without looking for them makes
files byte for byte like those of the real packages.
"""

from __future__ import annotations

import io
import pickle
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ScaleByAdamState = namedtuple("ScaleByAdamState", "count mu nu", module="optax._src.transform")
ScaleByScheduleState = namedtuple("ScaleByScheduleState", "count", module="optax._src.transform")
EmptyState = namedtuple("EmptyState", "", module="optax._src.base")


class FrozenDict:
    """flax's, as far as pickling goes."""

    __module__ = "flax.core.frozen_dict"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._dict = {key: FrozenDict(v) if isinstance(v, dict) else v for key, v in values.items()}

    def unfreeze(self) -> dict[str, Any]:
        return {key: v.unfreeze() if isinstance(v, FrozenDict) else v for key, v in self._dict.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (self.unfreeze(),)


class NamePickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes names of classes and functions as they are, numpy's private module as numpy 1 or 2 calls it."""

    def __init__(self, file: io.BytesIO, *, numpy: int = 1, protocol: int = 4) -> None:
        super().__init__(file, protocol)
        self._core = {1: "numpy.core", 2: "numpy._core"}[numpy]

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", self._core)
        if self.proto < 4:
            self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        else:
            self.save(module)
            self.save(name or obj.__name__)
            self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def dumped(value: Any, **style: Any) -> bytes:
    file = io.BytesIO()
    NamePickler(file, **style).dump(value)
    return file.getvalue()


def parameters(
    rng: np.random.Generator, *, width: int, depth: int, patch: int, channels: int, num_classes: int, mlp_ratio: int = 4
) -> dict[str, Any]:
    """A nested dictionary of random parameters under flax's names."""

    def dense(*shape: int) -> dict[str, np.ndarray]:
        kernel = rng.normal(size=shape, scale=np.prod(shape[:-1]) ** -0.5)
        return {"bias": rng.normal(size=shape[-1], scale=0.1).astype("f4"), "kernel": kernel.astype("f4")}

    w = width
    tree: dict[str, Any] = {
        f"DiTBlock_{i}": {
            "Dense_0": dense(w, 6 * w),
            **{f"Dense_{j}": dense(w, w) for j in range(1, 5)},
            "MlpBlock_0": {"Dense_0": dense(w, mlp_ratio * w), "Dense_1": dense(mlp_ratio * w, w)},
        }
        for i in range(depth)
    }
    tree["Embed_0"] = {"embedding": rng.normal(size=(256, 1)).astype("f4")}
    tree["FinalLayer_0"] = {"Dense_0": dense(w, 2 * w), "Dense_1": dense(w, patch**2 * channels)}
    tree["LabelEmbedder_0"] = {"Embed_0": {"embedding": rng.normal(size=(num_classes + 1, w)).astype("f4")}}
    tree["PatchEmbed_0"] = {"Conv_0": dense(patch, patch, channels, w)}
    for i in range(2):
        tree[f"TimestepEmbedder_{i}"] = {"Dense_0": dense(256, w), "Dense_1": dense(w, w)}
    return tree


def checkpoint(params: Any, params_ema: Any, *, mu: Any = None, step: int = 7) -> dict[str, Any]:
    """What the released code pickles."""

    def zeros(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: zeros(part) for key, part in tree.items()}
        return np.zeros_like(tree)

    count = np.asarray(step - 1, np.int32)
    plain = params.unfreeze() if isinstance(params, FrozenDict) else params
    mu, nu = (zeros(plain) if mu is None else mu), zeros(plain)
    if isinstance(params, FrozenDict):
        mu, nu = FrozenDict(mu), FrozenDict(nu)
    adam = ScaleByAdamState(count, mu, nu)
    state = {
        "params": params,
        "params_ema": params_ema,
        "opt_state": ((adam, EmptyState(), ScaleByScheduleState(count)),),
        "step": np.asarray(step, np.int32),
    }
    return {"train_state": state, "_timestamp": 1.7e9}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters by their names joined with '/'."""
    found: dict[str, np.ndarray] = {}
    for key, part in tree.items():
        found |= flat(part, f"{prefix}{key}/") if isinstance(part, dict) else {prefix + key: part}
    return found


def write(path: Path, value: Any, **style: Any) -> Path:
    path.write_bytes(dumped(value, **style))
    return path


def write_sparse_xl(path: Path) -> None:
    """DiT-XL/2 on ImageNet with its optimizer, all zero: 10.8 GB of which the disk keeps a few kilobytes."""
    from shortcutflow.interop.released.sizes import Sizes, expected_shapes
    from shortcutflow.interop.released.writer import pickle_released

    shapes = expected_shapes(Sizes(width=1152, depth=28, hidden=4608, patch=2, channels=4, num_classes=1000))

    class Sparse(io.FileIO):
        def write(self, content: Any) -> int:
            if len(content) < 4096:
                return super().write(content)
            assert not np.frombuffer(content, np.uint8).any()
            self.seek(len(content), io.SEEK_CUR)
            return len(content)

    arrays = {name: lambda shape=shape: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with Sparse(path, "w") as file:
        pickle_released(file, params=arrays, params_ema=arrays, step=1, timestamp=0.0)  # type: ignore[arg-type]
