"""The autoencoder that turns images into latents and back: diffusers' AutoencoderKL, loaded without unpickling.

An image goes to the moments of a normal distribution, mean and log-variance of each latent number. Training draws a new
latent from it at every step, as the released code does, and scales it so that latents have a standard deviation near 1:

    latent = (mean + exp(log-variance / 2) noise - shift_factor) * scaling_factor
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortcutflow.data.manifest import LatentsInfo
from shortcutflow.io.json import read_object

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
"""Hub id of the autoencoder of the paper, with scaling factor 0.18215; ``stabilityai/sd-vae-ft-ema`` is its sister."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LOG_VARIANCE_RANGE = (-30.0, 20.0)
logger = logging.getLogger(__name__)


class Autoencoder:
    """An autoencoder of images, float32 and without gradients; a GPU's convolutions follow torch's own TF32 switch.

    Args:
        network: diffusers' AutoencoderKL.
        name: its hub id, or its folder's absolute path.
        device: where it computes.

    Attributes:
        sha256: of its weights, see :func:`weights_sha256`.
        scaling_factor, shift_factor: a latent is (posterior sample - shift_factor) * scaling_factor.
        image_channels, latent_channels: channels of an image and of a latent.
        downsampling: pixels along the side of one latent place, 8 for Stable Diffusion's.

    Raises:
        ValueError: if its config normalises each channel by itself, which one scale and shift cannot express.
    """

    def __init__(self, network: nn.Module, name: str, *, device: torch.device | str = "cpu") -> None:
        config: Any = network.config
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise ValueError(
                f"autoencoder {name} normalises each latent channel by its own mean and deviation, which is not "
                f"supported: take one with a single scaling factor, such as {DEFAULT_VAE}"
            )
        self.name, self.sha256 = name, weights_sha256(network.state_dict())
        self.scaling_factor = float(config["scaling_factor"])
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        self.image_channels, self.latent_channels = int(config["in_channels"]), int(config["latent_channels"])
        self.downsampling = 2 ** (len(config["block_out_channels"]) - 1)
        self.device = torch.device(device)
        self._network: Any = network.float().eval().requires_grad_(False).to(self.device)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Shape (channels, height, width) of the latent of a square image of ``size`` pixels.

        Raises:
            ValueError: if the size is no multiple of :attr:`downsampling`.
        """
        if size < 1 or size % self.downsampling:
            raise ValueError(f"autoencoder {self.name} takes sizes that {self.downsampling} divides, got {size}")
        return self.latent_channels, size // self.downsampling, size // self.downsampling

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments (b, 2 latent_channels, h / downsampling, w / downsampling) of images (b, channels, h, w) in [-1, 1].

        Means come first, then log-variances, limited to [-30, 20] as diffusers does before it uses them. Nothing is
        scaled; :func:`draw_latents` does.

        Raises:
            ValueError: for another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != self.image_channels:
            raise ValueError(f"images must be (b, {self.image_channels}, h, w), got {tuple(pixels.shape)}")
        for side in pixels.shape[2:]:
            self.latent_shape(side)
        moments = self._network.encode(pixels.to(self.device, torch.float32)).latent_dist.parameters
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, *, batch_size: int = 16) -> Tensor:
        """Images (b, channels, h, w) in [-1, 1] of scaled latents, where the latents are; a few at a time go through.

        Values outside [-1, 1] are cut off there.

        Raises:
            ValueError: for latents that are not (b, latent_channels, h, w).
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be (b, {self.latent_channels}, h, w), got {tuple(latents.shape)}")
        images = []
        for part in latents.split(batch_size):
            unscaled = part.to(self.device, torch.float32) / self.scaling_factor + self.shift_factor
            images.append(self._network.decode(unscaled).sample.clamp(-1, 1).to(latents.device))
        return torch.cat(images)


def draw_latents(moments: Tensor, noise: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Scaled latents (b, c, h, w), a draw from each posterior: (mean + exp(log-variance / 2) noise - shift) * scale.

    Args:
        moments: (b, 2c, h, w), means and then log-variances, of any float type; computed in float32.
        noise: (b, c, h, w), standard normal; zeros give the posterior's mean.
        scaling_factor, shift_factor: of the autoencoder.

    Raises:
        ValueError: if the shapes do not fit.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise.shape != mean.shape or log_variance.shape != mean.shape:
        raise ValueError(f"noise must have half the channels of the moments, {tuple(moments.shape)}; got {noise.shape}")
    # In place: this is most of the work of streaming latents.
    latents = torch.exp(log_variance * 0.5).mul_(noise).add_(mean)
    if shift_factor:
        latents.sub_(shift_factor)
    return latents.mul_(scaling_factor)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor in the order of names, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_autoencoder(
    name_or_folder: str | Path = DEFAULT_VAE,
    *,
    expect: LatentsInfo | None = None,
    other_decoder: bool = False,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """Load an autoencoder from a folder, or by its hub id from the local cache or the hub.

    Only safetensors weights are read, never pickled ones.

    Args:
        name_or_folder: a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, or a hub id.
        expect: how the latents were made that it is for; None checks nothing.
        other_decoder: allow other weights than those, with a warning: some autoencoders differ in their decoders alone.
        device: where it computes.

    Raises:
        ImportError: without diffusers.
        OSError: if it is neither here nor can be downloaded.
        ValueError: if the config is of another kind of network, weights are missing or do not fit, or it is not the
            autoencoder of the expected latents.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("the autoencoder needs diffusers: pip install 'shortcutflow[latents]'") from error
    folder = _local_folder(name_or_folder)
    # Of another network diffusers would load as much as has the same names.
    if (kind := read_object(folder / CONFIG_FILE, "an autoencoder").get("_class_name")) != "AutoencoderKL":
        raise ValueError(f"{folder / CONFIG_FILE} describes {kind!r}; the autoencoder must be an 'AutoencoderKL'")
    try:
        network, info = AutoencoderKL.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            torch_dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except (RuntimeError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"autoencoder {name_or_folder} cannot be read: {str(error).splitlines()[0]}") from error
    # diffusers only warns of these, and leaves such weights at random numbers.
    if wrong := [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]:
        raise ValueError(
            f"autoencoder {name_or_folder} is not complete: {len(wrong)} weights missing, such as {wrong[0]}"
        )
    name = str(Path(name_or_folder).absolute() if Path(name_or_folder).is_dir() else name_or_folder)
    autoencoder = Autoencoder(network, name, device=device)
    if expect is not None and (differing := expect.differing(autoencoder)):
        values = ", ".join(
            f"{field} {getattr(expect, field)}, here {getattr(autoencoder, field)}" for field in differing
        )
        message = f"these latents were made with the autoencoder {expect.vae}, not with {name} ({values})"
        if not other_decoder or differing != ["sha256"]:
            raise ValueError(f"{message}: give the folder of the one that made them")
        logger.warning("%s; it decodes them all the same", message)
    return autoencoder


def _local_folder(name_or_folder: str | Path) -> Path:
    """The folder with config and weights: a local one, or from the hub's cache, or downloaded."""
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.is_dir():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"folder {folder} holds no {file}: an autoencoder's folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    file = CONFIG_FILE
    try:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            try:
                path = hf_hub_download(name, file, local_files_only=True)
            except FileNotFoundError:
                path = hf_hub_download(name, file)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and a hub id would read NAME/REPOSITORY, such as {DEFAULT_VAE}"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise OSError(
            f"autoencoder {name} is not in the local cache and its {file} cannot be downloaded "
            f"({type(error).__name__}); give a local folder with {CONFIG_FILE} and {WEIGHTS_FILE} instead"
        ) from error
    return Path(path).parent
