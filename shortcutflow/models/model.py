"""A model from a folder or the hub, ready to sample."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from shortcutflow.conditions import as_condition
from shortcutflow.config import CONFIG_FILE, RunConfig
from shortcutflow.io.atomic import require_absent
from shortcutflow.io.safetensors import read_tensors
from shortcutflow.models.config import (
    COMPANIONS,
    ModelConfig,
    config_of_run,
    read_config,
    weights_file,
)
from shortcutflow.objectives.objective import HEAD
from shortcutflow.run_dir import info_of_run, read_weights
from shortcutflow.sampling import draw_noise, sample

HUB_FILES = [CONFIG_FILE, "weights*.safetensors", *COMPANIONS]
"""All that is downloaded of a repository."""

_REMEDY = "get it again from where it came from"

_FILE_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl", ".pickle", ".tmp", ".onnx", ".pt2")


def is_hub_id(place: str | Path) -> bool:
    """Whether this is an "owner/name" of the hub, and not a mistyped path: no such file, file ending or parent."""
    path = Path(place)
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)) is not None
    return shaped and not (path.exists() or path.parent.exists() or path.suffix in _FILE_ENDINGS)


@dataclass(frozen=True)
class Model:
    """A network with what its sampler must know.

    Attributes:
        network: s(x_t, t, d, y), in eval mode.
        config: shape of samples, conditions, finest steps and so on.
        weights: the name of the weights in it.
        folder: where it came from.
    """

    network: nn.Module
    config: ModelConfig
    weights: str
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        return self.config.shape

    @property
    def num_classes(self) -> int | None:
        """Number of labels, or None."""
        return self.config.num_classes

    @property
    def null_y(self) -> float | None:
        """The null condition."""
        return self.config.null_y

    @property
    def finest_steps(self) -> int:
        """M of the training."""
        return self.config.finest_steps

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes labels or other conditions."""
        return self.num_classes is not None or self.config.condition_shape is not None

    @property
    def null_condition(self) -> float | None:
        """What y is without a condition: the null label as an integer, what fills a tensor, or None."""
        if self.num_classes is not None:
            return self.num_classes if self.null_y is None else int(self.null_y)
        return None if self.config.condition_shape is None else (self.null_y or 0.0)

    def example_inputs(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Noise (rows, *shape) and conditions to try the model with, always the same; labels include the null label."""
        generator = Generator().manual_seed(rows)
        noise = torch.randn(rows, *self.shape, generator=generator)
        if self.num_classes is not None:
            return noise, (torch.arange(rows) + self.num_classes - 1) % (self.num_classes + 1)
        if self.config.condition_shape is not None:
            return noise, torch.randn(rows, *self.config.condition_shape, generator=generator)
        return noise, None

    def sample(
        self,
        noise: Tensor | int,
        y: Tensor | int | None = None,
        *,
        steps: int | Sequence[float] = 1,
        guidance_scale: float = 1.0,
        generator: Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples (b, *shape) on the network's device; see :func:`shortcutflow.sample`.

        Args:
            noise: x_0 (b, *shape), or how many samples to draw it for, from ``generator``.
            y: the condition of each sample, or one label for all; None is the null condition.
            steps: a number of steps, or step sizes that add up to 1.
            guidance_scale: of classifier-free guidance; 1 is none.
            generator: where noise comes from, also that which the sampler of consistency models adds.
            progress: show a progress bar.

        Raises:
            ValueError: for labels out of range, and as :func:`shortcutflow.sample`.
        """
        device = next(self.network.parameters()).device
        if isinstance(noise, int):
            if noise < 1:
                raise ValueError(f"the number of samples must be at least 1, got {noise}")
            noise = draw_noise((noise, *self.shape), generator=generator, device=device)
        noise = noise.to(device)
        y = torch.full((len(noise),), y, device=device) if isinstance(y, int) else as_condition(y, device)
        if y is not None and self.num_classes is not None:
            lowest, highest = int(y.min()), int(y.max())
            if lowest < 0 or highest > self.num_classes:
                raise ValueError(f"labels must be from 0 to {self.num_classes} (none), got {lowest} to {highest}")
        return sample(
            self.network, noise, y,
            steps=steps, guidance_scale=guidance_scale, null_y=self.null_y,
            finest_steps=self.finest_steps, flow_only=self.config.flow_only,
            sampler=self.config.sampler, generator=generator, progress=progress,
        )  # fmt: skip

    def save(self, folder: Path | str) -> None:
        """Write the model into a folder that :func:`load` reads; see ``hub.HubModel`` for one with a card."""
        save_model(self, Path(folder))


def load(
    path: str | Path,
    *,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
) -> Model:
    """Load a model from its folder, a run's folder, or the Hugging Face hub.

    >>> model = shortcutflow.load("DIR or hub id")
    >>> images = model.sample(16, steps=4)

    Nothing in the folder is run: the config names a network that is installed here, the weights are safetensors.

    Args:
        path: a folder, or a hub id "owner/name" (needs ``pip install 'shortcutflow[hub]'``).
        weights: which of the folder's weights, "current" or an EMA's name; None takes the config's.
        device: of the network.
        image_size: side of the samples, if not the config's: a transformer's weights fit any that its patch divides.

    Raises:
        FileNotFoundError: if there is no such folder or it lacks a file.
        ValueError: for an unknown backbone, listing the installed ones, unknown weights, or weights that do not fit.
    """
    folder = download(str(path)) if is_hub_id(path) else Path(path)
    return load_folder(folder, weights=weights, device=device, image_size=image_size)


def download(hub_id: str, **options: Any) -> Path:
    """The folder of a hub repository's config, weights and reports, from the hub's cache or downloaded.

    Args:
        hub_id: "owner/name".
        options: of ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: without huggingface_hub, if there is no such repository, or it cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no run or model at {hub_id}; if it is a hub id, models on the hub need huggingface_hub: "
            "pip install 'shortcutflow[hub]'"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no run or model at {hub_id}, and the hub has none of that name: {error}"
        ) from error


def load_folder(
    folder: Path,
    *,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
) -> Model:
    """As :func:`load`, from a folder only."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; a hub id is owner/name, where no folder owner is here")
    found = read_config(folder)
    config, tensors = _run(folder, found, weights) if isinstance(found, RunConfig) else _model(folder, found, weights)
    if image_size is not None:
        if len(config.shape) != 3:
            raise ValueError(f"image_size is for images, this model makes samples of shape {config.shape}")
        config = config.model_copy(update={"shape": (config.shape[0], image_size, image_size)})
    network = config.build_network()
    try:
        network.load_state_dict({name: t for name, t in tensors.items() if not name.startswith(f"{HEAD}.")})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights in {folder} do not fit the network of its config: {reason[:300]}") from error
    name = weights or config.default_weights
    return Model(network.to(device).eval(), config, name, folder)


def _model(folder: Path, config: ModelConfig, weights: str | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors of a model's folder."""
    weights = weights or config.default_weights
    if weights not in config.weights:
        raise ValueError(f"{folder} has no weights {weights!r}; it has: {', '.join(config.weights)}")
    return config, read_tensors(folder / weights_file(weights), _REMEDY)[0]


def _run(folder: Path, run: RunConfig, weights: str | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors of a run's folder."""
    read = read_weights(folder, run, weights)
    return config_of_run(run, info_of_run(folder, run), weights=read.name, step=read.step), read.tensors


def save_model(model: Model, folder: Path) -> None:
    """Write config and weights, the folder's other weights too, and what was measured of them."""
    if (folder / CONFIG_FILE).is_file():
        read_config(folder)  # a model's folder may be written again, but no other
    elif not (folder.exists() and folder.samefile(model.folder)):
        require_absent(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in model.config.weights:
        file = weights_file(name)
        if name == model.weights:
            _write(model, folder / file)
        else:
            _copy(model.folder / file, folder / file)
    for pattern in COMPANIONS:
        for companion in model.folder.glob(pattern):
            _copy(companion, folder / companion.name)
    model.config.save(folder)


def _write(model: Model, path: Path) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    metadata = {"weights": model.weights, "step": "" if model.config.step is None else str(model.config.step)}
    save_file(state, path, metadata=metadata)


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
