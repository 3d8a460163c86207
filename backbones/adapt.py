"""Any network as a shortcut model: a step-size embedding added to one that knows none.

The embedding's contribution starts at zero, so an adapted network gives what the network gave before, and pretrained
weights keep what they know; training then lets the step size in.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.embeddings import Condition, without_autocast

Call = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]


def adapt(
    network: nn.Module,
    *,
    shape: Sequence[int],
    at: str | None = None,
    call: Call | None = None,
    embed: Sequence[str] = ("d",),
    num_classes: int | None = None,
    finest_steps: int = 128,
    width: int = 256,
    features: int | None = None,
) -> Adapted:
    """Turn a network that takes (x, t) or (x, t, y) into one that takes (x_t, t, d, y).

    >>> net = adapt(MyUNet(), shape=(3, 32, 32), at="time_embedding")       # called as MyUNet()(x, t)
    >>> net = adapt(nn.Sequential(...), shape=(2,), embed=("t", "d"))       # called with x alone
    >>> net = adapt(unet, shape=(4, 32, 32), at="time_embedding",           # one of diffusers
    ...             call=lambda net, x, t, y: net(x, 1000 * (1 - t), class_labels=y).sample)

    The network itself is changed (a hook is put on one of its parts) and from then on called through the result.

    Args:
        network: maps x_t (b, *shape), and what else it takes, to the same shape.
        shape: shape of one sample, of any number of dimensions.
        at: name of the part (see ``network.named_modules()``) to whose output the embedding is added; its channels are
            axis 1 of (b, c, h, w) or (b, c, frames, h, w), or the last axis. The output of a time embedding is the best
            place, that of a patch embedding the second best. None adds to x_t, whose channels are axis 0 of the shape
            of an image or a video, else the last.
        call: how to call the network, as ``call(network, x_t, t, y)``: translates times, names arguments, unpacks
            results. None calls network(x_t), with t unless that is embedded here, and with y if the network takes it.
        embed: what to embed here, "d" and, of a network that does not take them, "t" and "y".
        num_classes: number of labels, to embed "y"; label ``num_classes`` is the null condition.
        finest_steps: M; step sizes at or below 1/M are one and the same.
        width: size of the embedding.
        features: channels of that part's output; None takes those of its last layer.

    Raises:
        ValueError: if there is no part of that name, embed is not of these letters, the network was adapted before or
            is compiled around that part, or, at a call, the part is not used, has other channels, or the network does
            not return the shape it is given.
    """
    return Adapted(network, shape, at, call, tuple(embed), num_classes, finest_steps, width, features)


class Adapted(nn.Module):
    """What :func:`adapt` gives; ``network`` is the network itself, with its own names of parameters.

    It has ``shard_plan``, ``flops`` and ``compile_blocks`` as every backbone has. Gradient checkpointing is the
    network's own affair, and must not run the part that takes the embedding a second time.
    """

    flops = Backbone.flops

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        at: str | None,
        call: Call | None,
        embed: tuple[str, ...],
        num_classes: int | None,
        finest_steps: int,
        width: int,
        features: int | None,
    ) -> None:
        super().__init__()
        if "d" not in embed or not set(embed) <= {"t", "d", "y"}:
            raise ValueError(f'embed must name "d" and may name "t" and "y", got {embed}')
        if ("y" in embed) != (num_classes is not None):
            raise ValueError(f'embed "y" and num_classes go together: embed is {embed}, num_classes is {num_classes}')
        _require_unadapted(network)
        self.network, self.shape, self.at, self.embed = network, tuple(shape), at, embed
        self.call = call or _positional_call(network, embed)
        device = next(network.parameters(), torch.empty(0)).device
        self.condition = Condition(
            width, num_classes=num_classes, finest_steps=finest_steps, embeds_time="t" in embed
        ).to(device)
        if at is None:
            features = self.shape[0] if len(self.shape) >= 3 else self.shape[-1]
        else:
            part = _part(network, at)
            features = features or _channels_of(part, at)
            part.register_forward_hook(self._add_to_output)
        self.out = nn.Linear(width, features, bias=False, device=device)
        nn.init.zeros_(self.out.weight)
        self._embedding: Tensor | None = None
        self._used = False

    def zero_step_embedding(self, finest_steps: int) -> None:
        """See :meth:`Condition.zero_step_embedding`; to start from a flow model, before the network is sharded."""
        self.condition.zero_step_embedding(finest_steps)

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None = None) -> Tensor:
        """The average velocity over [t, t + d]: x_t (b, *shape), t and d (b,), y as the network or its labels want."""
        if x_t.shape[1:] != self.shape or t.shape != (len(x_t),) or d.shape != t.shape:
            raise ValueError(
                f"x_t must have shape (batch, {', '.join(map(str, self.shape))}), t and d (batch,), got "
                f"{tuple(x_t.shape)}, {tuple(t.shape)} and {tuple(d.shape)}"
            )
        c = F.silu(self.condition(t, d, y if "y" in self.embed else None))
        with without_autocast(c):
            embedding = self.out(c.to(self.out.weight.dtype))
        if self.at is None:
            return self._checked(self.call(self.network, self._sum(x_t, embedding), t, y), x_t)
        self._embedding, self._used = embedding, False
        try:
            v = self.call(self.network, x_t, t, y)
        finally:
            self._embedding = None
        if not self._used:
            raise ValueError(f"the network did not call its part {self.at!r}, so the step size had no way in")
        return self._checked(v, x_t)

    def shard_plan(self) -> list[nn.Module]:
        """Elements of the network's outermost lists of modules that have parameters."""
        return list(_elements(self.network)) or [self.network]

    def compile_blocks(self, **options: Any) -> None:
        """As of every backbone, but a foreign block may break the graph."""
        Backbone.compile_blocks(self, **{"fullgraph": False} | options)  # type: ignore[arg-type]

    def _add_to_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self._embedding is None:
            raise RuntimeError(
                f"part {self.at!r} of an adapted network ran outside of it: call the network through what adapt() "
                "returned, and do not checkpoint this part"
            )
        self._used = True
        return self._sum(output, self._embedding)

    def _sum(self, x: Tensor, embedding: Tensor) -> Tensor:
        features = embedding.shape[1]
        if x.ndim >= 4 and x.shape[1] == features:
            axis = 1
        elif x.shape[-1] == features:
            axis = x.ndim - 1
        else:
            raise ValueError(f"part {self.at!r} gives {tuple(x.shape)}, without an axis of {features} channels")
        shape = [len(x) if i == 0 else features if i == axis else 1 for i in range(x.ndim)]
        return x + embedding.view(shape).to(x.dtype)

    @staticmethod
    def _checked(v: Tensor, x_t: Tensor) -> Tensor:
        if not isinstance(v, Tensor) or v.shape != x_t.shape:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"the network must return the shape of x_t, {tuple(x_t.shape)}, not {got}; see call=")
        return v


def _positional_call(network: nn.Module, embed: tuple[str, ...]) -> Call:
    """network(x_t), network(x_t, t) or network(x_t, t, y), by what it takes and what is embedded."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # What torch.compile returns takes anything.
    forward = getattr(network, "_orig_mod", network).forward
    takes = sum(p.kind in kinds for p in inspect.signature(forward).parameters.values())
    given = 1 if "t" in embed else 2
    if takes < given:
        raise ValueError('the network takes x alone: embed=("t", "d") gives it the time, or call= says how to call it')
    takes_y = "y" not in embed and takes > given

    def call(net: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if y is not None and not takes_y and "y" not in embed:
            raise ValueError('the network takes no condition: y must be None, or embed=("d", "y") with num_classes')
        return net(*(x_t, t)[:given], *((y,) if takes_y else ()))

    return call


def _require_unadapted(network: nn.Module) -> None:
    """Raise ValueError if a part of the network takes the embedding of another adapt() already."""
    for name, module in network.named_modules():
        hooks = module._forward_hooks.values()
        if isinstance(module, Adapted) or any(isinstance(getattr(h, "__self__", None), Adapted) for h in hooks):
            raise ValueError(
                f"the network was adapted before{f', at {name!r}' if name else ''}: use what that adapt() returned, or "
                "adapt a new copy of the network"
            )


def _part(network: nn.Module, name: str) -> nn.Module:
    parts = dict(network.named_modules())
    around = [parts[above] for above in parts if not above or name.startswith(f"{above}.")]
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in around):
        # A graph that is compiled already does not look for new hooks.
        raise ValueError(
            f"the network is compiled around part {name!r}, which the step size could not enter: adapt the network "
            "itself, then compile what adapt() returns"
        )
    if name not in parts:
        close = difflib.get_close_matches(name, parts, n=3) or [part for part in parts if part and "." not in part]
        raise ValueError(f"the network has no part {name!r}; it has, for example, {', '.join(map(repr, close[:8]))}")
    return parts[name]


def _channels_of(part: nn.Module, name: str) -> int:
    """Channels that the last layer inside the part puts out."""
    for module in reversed(list(part.modules())):
        for attribute in ("out_features", "out_channels", "embedding_dim", "num_channels", "num_features"):
            if isinstance(channels := getattr(module, attribute, None), int):
                return channels
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
    raise ValueError(f"the channels of the output of part {name!r} cannot be found from its layers: give features=")


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children() if not isinstance(module, nn.ModuleList | nn.Sequential) else [module]:
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (element for element in child if any(True for _ in element.parameters()))
        else:
            yield from _elements(child)
