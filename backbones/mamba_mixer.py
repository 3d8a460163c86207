"""Mamba: a selective state space in place of attention (Gu & Dao, arXiv 2312.00752).

The parameters of :class:`MambaMixer` have the names, shapes and meaning of those of ``Mamba`` in mamba-ssm's
``modules.mamba_simple``, so that either loads the other's state dict.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.embeddings import require_positive
from backbones.selective_scan import selective_scan

KERNELS = ("auto", "mamba-ssm", "torch")

_FASTEST, _SLOWEST, _FLOOR = 0.1, 0.001, 1e-4
"""Range of the step sizes at the start, and what they are clamped to from below."""

Fused = tuple[Callable[..., Tensor], Callable[..., Tensor] | None]
"""mamba-ssm's scan, and causal-conv1d's convolution if that is installed."""


@functools.cache
def fused_kernels() -> Fused | None:
    """The CUDA kernels of mamba-ssm, imported at the first call; None if it is absent or was built without them."""
    try:
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError:
        return None
    if getattr(interface, "selective_scan_cuda", None) is None:
        return None
    try:
        convolution = importlib.import_module("causal_conv1d").causal_conv1d_fn
    except (ImportError, AttributeError):
        convolution = None
    return interface.selective_scan_fn, convolution


class Direction(nn.Module):
    """Convolution and selective scan along the tokens in one order, all of Mamba between its two projections.

    Args:
        width: channels inside.
        state: numbers each channel remembers.
        conv: tokens a convolution sees.
        rank: rank of the projection to the step sizes.
    """

    def __init__(self, width: int, state: int, conv: int, rank: int) -> None:
        super().__init__()
        self.split = (rank, state, state)
        self.conv1d = nn.Conv1d(width, width, conv, groups=width, padding=conv - 1)
        self.x_proj = nn.Linear(width, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.empty(width, state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(width, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As mamba-ssm: step sizes log-uniform in [0.001, 0.1], A = -1 ... -state, D = 1; in place, each parameter."""
        self.conv1d.reset_parameters()
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.split[0] ** -0.5), self.split[0] ** -0.5)
        step = self.dt_proj.bias.uniform_(math.log(_SLOWEST), math.log(_FASTEST)).exp_().clamp_(min=_FLOOR)
        step.expm1_().log_()  # softplus backwards
        for i in range(self.A_log.shape[1]):
            self.A_log[:, i].fill_(math.log(i + 1))
        self.D.fill_(1)

    def mix(self, x: Tensor, z: Tensor, fused: Fused | None) -> Tensor:
        """The scan of x, gated by z: (b, n, width) each, and so the result."""
        scan, convolution = (selective_scan, None) if fused is None else fused
        # One dtype under autocast, as the kernels want it.
        x = self._convolved(x, convolution).to(x.dtype)
        step, into, out_of = self.x_proj(x).split(self.split, dim=-1)
        # Without the bias, which the scan adds in float32 within the softplus.
        step = F.linear(step, self.dt_proj.weight)
        delta, B, C = (value.to(x.dtype).mT for value in (step, into, out_of))
        A = -torch.exp(self.A_log.float())
        bias = self.dt_proj.bias.float()
        return scan(x.mT, delta, A, B, C, self.D.float(), z=z.mT, delta_bias=bias, delta_softplus=True).mT

    def _convolved(self, x: Tensor, convolution: Callable[..., Tensor] | None) -> Tensor:
        """SiLU of the causal convolution, (b, n, width)."""
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if convolution is not None:
            return convolution(x.mT, weight.squeeze(1), bias, activation="silu").mT
        # As two dimensions, one of them 1: with channels innermost PyTorch has a kernel for these only.
        x = F.pad(x, (0, 0, weight.shape[-1] - 1, 0))
        return F.silu(F.conv2d(x.mT.unsqueeze(2), weight.unsqueeze(2), bias, groups=len(weight)).squeeze(2).mT)


class MambaMixer(Direction):
    """Mamba-1's mixer: project, convolve, scan, gate, project back. A token sees those before it, or all.

    Args:
        width: channels of a token.
        state: numbers each inner channel remembers.
        conv: tokens the convolution sees, the token itself included.
        expand: inner channels over width.
        dt_rank: rank of the step sizes' projection; None is width/16, rounded up.
        bidirectional: scan the tokens in reversed order too, with parameters of its own (``reversed.*``) between the
            same projections, and add (as Vision Mamba, arXiv 2401.09417): image patches have no first and last.
        kernels: "mamba-ssm" for that package's CUDA kernels; "torch" for :func:`selective_scan`; "auto" for the
            former where x is on a GPU and the package is there, else the latter.

    Raises:
        ValueError: if kernels is none of these; at a call, if x is on a CPU and kernels is "mamba-ssm".
        ImportError: if kernels is "mamba-ssm" and that cannot be imported.
    """

    def __init__(
        self, width: int, state: int = 16, conv: int = 4, expand: int = 2, dt_rank: int | None = None, *,
        bidirectional: bool = False, kernels: str = "auto",
    ) -> None:  # fmt: skip
        if kernels not in KERNELS:
            raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
        require_positive(width=width, state=state, conv=conv, expand=expand, dt_rank=dt_rank)
        inner = expand * width
        sizes = (inner, state, conv, math.ceil(width / 16) if dt_rank is None else dt_rank)
        super().__init__(*sizes)
        self.kernels = kernels
        # Here, not at a call: torch.compile would have to follow an import.
        wanted = kernels == "mamba-ssm" or (kernels == "auto" and torch.cuda.is_available())
        self.fused = fused_kernels() if wanted else None
        if kernels == "mamba-ssm" and self.fused is None:
            raise ImportError(
                "kernels='mamba-ssm' needs mamba-ssm with its CUDA kernels: "
                "pip install 'shortcutflow[mamba]' --no-build-isolation"
            )
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.reversed = Direction(*sizes) if bidirectional else None
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills every parameter, in place: also after ``to_empty``, and if they are sharded."""
        super().reset_parameters()
        for module in (self.in_proj, self.out_proj, self.reversed):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) to the same."""
        if self.kernels == "mamba-ssm" and not x.is_cuda:
            raise ValueError(f"kernels='mamba-ssm' runs on a GPU only, x is on {x.device}: use 'auto' or 'torch'")
        fused = self.fused if x.is_cuda else None
        inside, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.mix(inside, z, fused)
        if self.reversed is not None:
            y = y + self.reversed.mix(inside.flip(1), z.flip(1), fused).flip(1)
        return self.out_proj(y)
