"""Networks s(x_t, t, d, y) behind names.

>>> import backbones
>>> net = backbones.create("dit_b_2", shape=(4, 32, 32), num_classes=1000)

A builder is called as ``builder(shape=..., num_classes=..., finest_steps=..., **options)`` and returns a module called
as ``net(x_t, t, d, y)``. Add one with :func:`register`, or from another package through the entry-point group
``shortcutflow.backbones``, whose entries name a mapping from name to builder.
"""

from backbones import diffusers_unet as _diffusers_unet
from backbones import dit as _dit
from backbones import lstm as _lstm
from backbones import mamba as _mamba
from backbones import transformer as _transformer
from backbones import unet as _unet
from backbones.adapt import Adapted, adapt
from backbones.registry import BUILDERS, create, names, register

for _family in (_diffusers_unet, _dit, _lstm, _mamba, _transformer, _unet):
    BUILDERS.update(_family.PRESETS)

__all__ = ["BUILDERS", "Adapted", "adapt", "create", "names", "register"]
