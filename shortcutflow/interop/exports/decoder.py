"""The decoder of an autoencoder as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shortcutflow.data.autoencoder import Autoencoder


class Decoder(nn.Module):
    """Scaled latents (b, c, h, w) to pictures in [-1, 1]: the numbers of :meth:`Autoencoder.decode`.

    Args:
        autoencoder: on the CPU.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        network: Any = autoencoder._network
        self.first, self.decoder = network.post_quant_conv, network.decoder
        self.scale, self.shift = autoencoder.scaling_factor, autoencoder.shift_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures (b, channels, height, width)."""
        latents = latents / self.scale + self.shift
        return self.decoder(latents if self.first is None else self.first(latents)).clamp(-1, 1)


def check_decodes(autoencoder: Autoencoder, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless samples of this shape can be the autoencoder's latents."""
    if len(shape) != 3 or shape[0] != autoencoder.latent_channels:
        raise ValueError(
            f"--decoder {autoencoder.name} decodes latents of {autoencoder.latent_channels} channels; this model makes "
            f"samples of shape {shape}"
        )
