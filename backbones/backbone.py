"""What all networks of this package have in common, besides being called as net(x_t, t, d, y)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from backbones.diffusion import Diffusion
from backbones.embeddings import Condition, SinusoidalEmbedding


class Backbone(nn.Module):
    """A network s(x_t, t, d, y) for images (channels, height, width) or sequences (length, channels).

    An image has the size the network was built for; a sequence may have another length at each call. A subclass for
    samples of another number of axes, such as videos (channels, frames, height, width), says so in ``axes``.

    A large network is built without memory and filled where it will live::

        with torch.device("meta"):
            net = backbones.create("dit_xl_2", shape=(4, 32, 32))
        net.to_empty(device="cuda").reset_parameters()

    Args:
        shape: shape of one sample.

    Attributes:
        axes: numbers of axes that a sample may have.
        gradient_checkpointing: run each unit of :meth:`shard_plan` again in the backward pass instead of keeping what
            is in it: less memory, for a third more time. May be set at any time.
        diffusion: turns the prediction of a network that was trained to undo diffusion into a velocity; None otherwise.

    Raises:
        ValueError: for a shape of another number of axes, or with an axis of no length.
    """

    axes: ClassVar[tuple[int, ...]] = (2, 3)
    condition: Condition

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if len(self.shape) not in self.axes or min(self.shape) < 1:
            kinds = {2: "(length, channels)", 3: "(channels, height, width)"}
            allowed = " or ".join(kinds.get(n, f"{n} numbers, channels first") for n in sorted(self.axes, reverse=True))
            raise ValueError(f"shape must be {allowed}, got {self.shape}")
        self.gradient_checkpointing = False
        self.diffusion: Diffusion | None = None

    @property
    def is_image(self) -> bool:
        """Whether samples are (channels, height, width)."""
        return len(self.shape) == 3

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        return self.shape[1] if len(self.shape) == 2 else self.shape[0]

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Any = None) -> Tensor:
        """The average velocity over [t, t + d].

        Args:
            x_t: (b, *shape); a sequence may have any length that the network takes.
            t, d: (b,) in [0, 1].
            y: labels (b,) int64, or the condition tensor (b, *condition_shape); None is the null condition. A network
                with ``guidance_input`` takes ``{"y": one of these, "guidance": (b,)}`` too.

        Returns:
            The shape of x_t, in x_t's dtype or autocast's.
        """
        self.check_inputs(x_t, t, d)
        if self.diffusion is None:
            return self._predict(x_t, self.condition(t, d, y))
        c = self.condition(t, d, y, self.diffusion.time(t))
        return self.diffusion.velocity(self._predict(self.diffusion.state(x_t, t), c), x_t, t)

    def _predict(self, x: Tensor, c: Tensor) -> Tensor:
        """What the network's own layers make of a sample (b, *shape) and the embedded condition (b, width)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fill every parameter and buffer anew, also after ``to_empty``."""
        raise NotImplementedError

    def zero_step_embedding(self, finest_steps: int) -> None:
        """See :meth:`Condition.zero_step_embedding`; to start from a flow model, before the network is sharded."""
        self.condition.zero_step_embedding(finest_steps)

    @property
    def guidance_input(self) -> bool:
        """Whether it takes the guidance scale as an input, and so is guided in one call."""
        return self.condition.guidance is not None

    @property
    def step_embedding(self) -> SinusoidalEmbedding:
        """The embedding of the step size."""
        return self.condition.step

    def shard_plan(self) -> list[nn.Module]:
        """The repeated parts, in the order they run: units for FSDP's ``fully_shard``, compilation and checkpoints."""
        raise NotImplementedError

    def run(self, unit: nn.Module, *inputs: Any) -> Any:
        """Call one unit of the shard plan, keeping its inside for the backward pass or not."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Nothing in a unit is random, so there is no state of a generator to bring back.
            return checkpoint(unit, *inputs, use_reentrant=False, preserve_rng_state=False)
        return unit(*inputs)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each unit of the shard plan in place, with options of ``torch.compile``.

        Equal units share one compilation, so this takes a fraction of the time of compiling the network whole; the
        names of parameters stay as they are. Raises ``torch.compiler.config.recompile_limit`` to 4 times the number of
        units, if it is lower.
        """
        import torch.compiler.config as limits  # loaded here: it takes a second

        units = self.shard_plan()
        # The versions of a class's forward for units of different sizes count as recompilations of one function. The
        # limit holds for the process and is only raised: it is read at each compilation, whenever that comes.
        limits.recompile_limit = max(limits.recompile_limit, 4 * len(units))
        for unit in units:
            unit.compile(**{"dynamic": False, "fullgraph": True} | options)

    @torch.no_grad()
    def flops(self, shape: Sequence[int] | None = None, y: Tensor | None = None) -> int:
        """Floating-point operations of one forward pass of one sample: products and, for scans, their recurrence.

        Args:
            shape: of the sample; None is the shape the network was built for.
            y: its condition (1, ...), for a network that does not take None.
        """
        # Loaded here: they take a second.
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.flop_counter import FlopCounterMode

        # Fake tensors have shapes and no numbers, so this takes no memory and works for a network on "meta" too.
        with FakeTensorMode() as fake:
            # On "cpu" and in float32 whatever the network is in: the count is the same.
            tensors = {
                name: torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype,
                                  device="cpu")
                for name, tensor in [*self.named_parameters(), *self.named_buffers()]
            }  # fmt: skip
            x_t, t = torch.empty(1, *(shape or self.shape), device="cpu"), torch.empty(1, device="cpu")
            formulas = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops}
            # Attention as two products, which the counter knows; it has no formula for the CPU's fused kernel.
            math_attention = sdpa_kernel(SDPBackend.MATH)
            with math_attention, FlopCounterMode(display=False, custom_mapping=formulas) as counter:
                functional_call(self, tensors, (x_t, t, t, None if y is None else fake.from_tensor(y)))
        return counter.get_total_flops()

    def check_inputs(self, x_t: Tensor, t: Tensor, d: Tensor) -> None:
        """Raise ValueError unless x_t is a batch of samples of this network, with a time and a step size for each."""
        expected: tuple[int | str, ...] = ("length", self.channels) if len(self.shape) == 2 else self.shape
        fits = x_t.ndim == len(self.shape) + 1 and all(
            wanted in (size, "length") for size, wanted in zip(x_t.shape[1:], expected, strict=True)
        )
        if not fits:
            raise ValueError(f"x_t must have shape (batch, {', '.join(map(str, expected))}), got {tuple(x_t.shape)}")
        if t.shape != (len(x_t),) or d.shape != (len(x_t),):
            raise ValueError(f"t and d must have shape ({len(x_t)},), got {tuple(t.shape)} and {tuple(d.shape)}")


def _recurrent_flops(
    x: Sequence[int], input_weight: Sequence[int], hidden_weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of oneDNN's recurrent layer, one direction: x (n, b, width), weights (gates, width) and (gates, hidden)."""
    return 2 * x[0] * x[1] * (math.prod(input_weight) + math.prod(hidden_weight))
