"""A network that is ready to be sampled: from a run's folder, a model's folder or the hub, and into a folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from shortcutflow.conditions import as_condition
from shortcutflow.config import CONFIG_FILE, RunConfig
from shortcutflow.data.autoencoder import weights_sha256
from shortcutflow.data.source import DataInfo, DataSource
from shortcutflow.io.atomic import require_absent
from shortcutflow.models.config import COMPANIONS, ModelConfig, config_of_run, read_config, weights_file
from shortcutflow.objectives.objective import HEAD
from shortcutflow.run_dir import RUNS, Weights, find_run, info_of_run, read_weights, read_weights_file
from shortcutflow.sampling import draw_noise, sample

HUB_FILES = [CONFIG_FILE, "weights*.safetensors", *COMPANIONS]
"""All that is downloaded of a repository."""

_FILE_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl", ".pickle", ".tmp", ".onnx", ".pt2")


def is_hub_id(place: str | Path) -> bool:
    """Whether this is an "owner/name" of the hub, and not a mistyped path: no such file, file ending or parent."""
    path = Path(place)
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)) is not None
    is_path = path.exists() or path.parent.exists() or path.suffix in _FILE_ENDINGS or path.parts[:1] == (RUNS,)
    return shaped and not is_path


@dataclass(frozen=True)
class Model:
    """A network with all that sampling it and naming it takes.

    Attributes:
        network: s(x_t, t, d, y), in eval mode.
        config: shape of samples, conditions, finest steps and so on.
        weights: the name of the weights in it: an EMA's, "current", or a file's.
        folder: the run's or model's folder that it came from.
        name: of the run or model, for reports.
        data: what it was trained on, if it is a run's.
    """

    network: nn.Module
    config: ModelConfig
    weights: str
    folder: Path
    name: str = ""
    data: DataSource | None = None

    def __str__(self) -> str:
        step = "" if self.config.step is None else f" at step {self.config.step}"
        return f"{self.folder}{step}, weights {self.weights}"

    @property
    def info(self) -> DataInfo:
        """Shape and conditions of a sample, and the autoencoder whose latents samples are."""
        return self.config.info

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
    def device(self) -> torch.device:
        """Of the network; the CPU if it has no parameters."""
        return next(self.network.parameters(), torch.empty(0)).device

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the network, as JSON: its description and the SHA-256 of its weights."""
        sha256 = weights_sha256(self.network.state_dict())
        return {"network": self.config.backbone.model_dump(), "weights_sha256": sha256}

    def sampler_options(self) -> dict[str, Any]:
        """What :func:`shortcutflow.sample` must know of this network."""
        config = self.config
        return {
            "sampler": config.sampler, "null_y": config.null_y,
            "finest_steps": config.finest_steps, "flow_only": config.flow_only,
        }  # fmt: skip

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
        device = self.device
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
            steps=steps, guidance_scale=guidance_scale, generator=generator, progress=progress,
            **self.sampler_options(),
        )  # fmt: skip

    def save(self, folder: Path | str) -> None:
        """Write a folder that :func:`load` reads: config and weights, the folder's other weights, what was measured.

        See ``hub.HubModel`` for a folder with a card.

        Raises:
            FileExistsError: if the folder holds something else than a model.
        """
        folder = Path(folder)
        if (folder / CONFIG_FILE).is_file():
            read_config(folder)  # a model's folder may be written again, but no other
        elif not (folder.exists() and folder.samefile(self.folder)):
            require_absent(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own, kept = weights_file(self.weights), {weights_file(name) for name in self.config.weights}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        step = "" if self.config.step is None else str(self.config.step)
        save_file(state, folder / own, metadata={"weights": self.weights, "step": step})
        companions = [file for pattern in COMPANIONS for file in self.folder.glob(pattern)]
        for file in [*(self.folder / name for name in kept - {own}), *companions]:
            target = folder / file.name
            if not (target.exists() and target.samefile(file)):
                shutil.copyfile(file, target)
        self.config.save(folder)


def load(
    path: str | Path,
    *,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
) -> Model:
    """Load a model from a run's folder, a model's folder, or the Hugging Face hub.

    >>> model = shortcutflow.load("DIR or hub id")
    >>> images = model.sample(16, steps=4)

    Nothing in the folder is run: the config names a network that is installed here, the weights are safetensors.

    Args:
        path: a folder, a folder of runs (the newest is taken), or a hub id "owner/name" (needs
            ``pip install 'shortcutflow[hub]'``).
        weights: "current", an EMA's name, or a safetensors file of whole tensors. None takes those that the config
            names; a run's are those of its newest checkpoint.
        device: of the network.
        image_size: side of the samples, if not the config's: a transformer's weights fit any that its patch divides.

    Raises:
        FileNotFoundError: if there is no such folder or it lacks a file.
        ValueError: for an unknown backbone, listing the installed ones, unknown weights, or weights that do not fit.
    """
    is_remote = is_hub_id(path)
    folder = download(str(path)) if is_remote else find_run(Path(path))
    found = read_config(folder)
    read = _read_weights(folder, found, weights)
    if isinstance(found, RunConfig):
        name, data = found.name, found.data
        config = config_of_run(found, info_of_run(folder, found), weights=read.name, step=read.step)
    else:
        name, data = str(path) if is_remote else folder.resolve().name, None
        config = found.model_copy(
            update={"weights": tuple(dict.fromkeys((*found.weights, read.name))), "step": read.step}
        )
    if image_size is not None:
        if len(config.shape) != 3:
            raise ValueError(f"image_size is for images, this model makes samples of shape {config.shape}")
        config = config.model_copy(update={"shape": (config.shape[0], image_size, image_size)})
    network = config.build_network()
    try:
        network.load_state_dict({name: t for name, t in read.tensors.items() if not name.startswith(f"{HEAD}.")})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the weights {read.name!r} do not fit the network that the config in {folder} describes: {reason[:300]}"
        ) from error
    return Model(network.to(device).eval(), config, read.name, folder, name, data)


def _read_weights(folder: Path, config: ModelConfig | RunConfig, weights: str | None) -> Weights:
    if weights is not None and weights.endswith(".safetensors"):
        name = re.sub(r"\W", "_", Path(weights).stem, flags=re.ASCII)
        return read_weights_file(Path(weights), name)._replace(name=name)
    if isinstance(config, RunConfig):
        return read_weights(folder, config, weights)
    weights = weights or config.default_weights
    if weights not in config.weights:
        raise ValueError(f"{folder} has no weights {weights!r}; it has: {', '.join(config.weights)}")
    return read_weights_file(folder / weights_file(weights), weights)._replace(name=weights, step=config.step)


def download(hub_id: str, *, allow_patterns: Sequence[str] = HUB_FILES, **options: Any) -> Path:
    """The folder of a hub repository's files, from the hub's cache or downloaded.

    Args:
        hub_id: "owner/name".
        allow_patterns: which files; by default a model's config, weights and reports.
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
        return Path(snapshot_download(hub_id, allow_patterns=list(allow_patterns), **options))
    except Exception as error:  # of the hub's client and of its network library
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"there is no run or model at {hub_id}, and the hub has none of that name: {reason}"
        ) from error
