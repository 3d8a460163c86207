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

from shortcutflow.interop.conversion import DiTSizes
from shortcutflow.interop.jax_checkpoint import params_of

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

    def __init__(self, file: Any, *, numpy: int = 1, protocol: int = 4) -> None:
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


def checkpoint(params: Any, params_ema: Any, *, mu: Any = None, nu: Any = None, step: int = 7) -> dict[str, Any]:
    """What the released code pickles."""

    def zeros(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: zeros(part) for key, part in tree.items()}
        return np.zeros_like(tree)

    count = np.asarray(step - 1, np.int32)
    plain = params.unfreeze() if isinstance(params, FrozenDict) else params
    mu, nu = (zeros(plain) if tree is None else tree for tree in (mu, nu))
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
    """DiT-XL/2 on ImageNet with its optimizer, all zero: 10.8 GB of which the disk keeps a few megabytes."""
    sizes = DiTSizes(1152, 28, 4608, 2, 4, 4, 1000)
    arrays = {key: param.shape for param in params_of(sizes).values() for key in param.keys}
    tree: dict[str, Any] = {}
    for name, shape in arrays.items():
        *folders, last = name.split("/")
        part = tree
        for folder in folders:
            part = part.setdefault(folder, {})
        # A view of one number, so that it takes no memory until it is pickled.
        part[last] = np.broadcast_to(np.float32(0), shape)

    class Sparse(io.FileIO):
        def write(self, content: Any) -> int:
            if len(content) < 2**16 or np.frombuffer(content, np.uint8).any():
                return super().write(content)
            self.seek(len(content), io.SEEK_CUR)
            return len(content)

    class ZeroPickler(NamePickler):
        def memoize(self, obj: Any) -> None:
            """Nothing but names: what was pickled is not kept."""
            if isinstance(obj, type) or callable(obj):
                super().memoize(obj)

    with Sparse(path, "w") as file:
        ZeroPickler(file).dump(checkpoint(tree, tree, mu=tree, nu=tree))
