"""Networks as graphs of PyTorch's own operators, for any number of samples: what every export starts from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F

BUILT_IN = ("aten", "prim", "prims")
"""Namespaces of operators that come with PyTorch."""
_ROWS = 3
"""Of the inputs a network is traced with; any number but 0 and 1, which the tracer takes for constants."""


def trace(module: nn.Module, inputs: Sequence[Tensor | None], *, what: str) -> ExportedProgram:
    """The graph of a module in eval mode, with a free number of samples and without gradients.

    Args:
        module: to trace, on the CPU.
        inputs: its arguments with one row a sample, any number of them; None stays None.
        what: it is, for messages.

    Raises:
        ValueError: if it cannot be traced, or calls operators that are not PyTorch's own.
    """
    rows = [None if x is None else x[:1].expand(_ROWS, *x.shape[1:]).contiguous() for x in inputs]
    batch = Dim("batch", min=1)
    free = tuple(None if x is None else {0: batch} for x in rows)
    try:
        with quietly(), torch.no_grad(), _without_limits(module):
            # Strict: only the compiler's tracer follows len(x) of a free number of samples.
            program = torch.export.export(module, tuple(rows), dynamic_shapes=free, strict=True)
    except Exception as error:  # whatever a network's own code and the tracer come up with
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be traced by torch.export: {said[:400]}") from error
    _check_operators(program, what)
    _forget_sources(program)
    return program


@contextmanager
def quietly() -> Iterator[None]:
    """Silence of PyTorch's exporters, which log and warn about what is then raised, or of no concern."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Upsampling(nn.Module):
    """What diffusers' ``Upsample2D`` computes, whatever the number of samples.

    diffusers' own looks at that number, and at the size of a batch, and rearranges memory from 64 samples on; a graph
    of it would end there.
    """

    def __init__(self, given: nn.Module) -> None:
        super().__init__()
        self.conv: Any = given.conv

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None, *_: Any) -> Tensor:
        """(b, c, h, w) to (b, c', 2 h, 2 w), or to another height and width."""
        scale = 2.0 if output_size is None else None
        x = F.interpolate(x, size=output_size, scale_factor=scale, mode="nearest")
        return x if self.conv is None else self.conv(x)


@contextmanager
def _without_limits(module: nn.Module) -> Iterator[None]:
    """Exchange what only works for some numbers of samples, and put it back."""
    found = [
        (parent, name, child) for parent in module.modules() for name, child in parent.named_children()
        if type(child).__name__ == "Upsample2D" and type(child).__module__.startswith("diffusers.") and _is_plain(child)
    ]  # fmt: skip
    for parent, name, child in found:
        setattr(parent, name, Upsampling(child))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def _is_plain(upsample: Any) -> bool:
    """Whether it enlarges and convolves only, with its convolution under the usual name."""
    return (
        upsample.norm is None and upsample.interpolate and not upsample.use_conv_transpose and upsample.name == "conv"
    )


def graphs(program: ExportedProgram) -> list[GraphModule]:
    """The graph and those nested in it."""
    return [part for part in program.graph_module.modules() if isinstance(part, GraphModule)]


def _check_operators(program: ExportedProgram, what: str) -> None:
    used = {node.target for part in graphs(program) for node in part.graph.nodes if node.op == "call_function"}
    foreign = sorted(
        str(target) for target in used if isinstance(target, torch._ops.OpOverload) and target.namespace not in BUILT_IN
    )
    if foreign:
        raise ValueError(
            f"{what} calls {', '.join(foreign)}, which exists only where its package is installed; its network must "
            "use PyTorch's own operators when torch.compiler.is_exporting() is true"
        )


def _forget_sources(program: ExportedProgram) -> None:
    """Drop the names of source files on this machine, which would be written into the file."""
    for part in graphs(program):
        for node in part.graph.nodes:
            node.meta.pop("stack_trace", None)
