"""Counts what a training step does, by running it on fake tensors, which have shapes and no numbers.

PyTorch's own means: a dispatch mode sees each operation, with the formulas of ``torch.utils.flop_counter``; the
compiler is stopped where it has decided which operations share a kernel, and its own estimate of each kernel's bytes
is taken; the compiled graph's operations then run one by one on fake tensors, so that shapes go on.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from shortcutflow import guidance
from shortcutflow.objectives import objective

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
NO_KERNEL = {
    aten.detach.default, aten.alias.default, aten.empty.memory_format, aten.empty_strided.default,
    aten.empty_like.default, aten.lift_fresh.default, aten._local_scalar_dense.default, aten.promote_types.default,
}  # fmt: skip
"""Operations that start nothing on a device, beside views."""
ON_A_CPU_ONLY = ("check_unit_interval", "_check")
"""Functions of the library that read numbers where that is free, and not on an accelerator."""


@dataclass
class Work:
    """Some kernels: how many, the bytes they read and write, their floating-point operations.

    ``bound_seconds`` is what they need at least, one after the other, if each is limited by the products' rate or by
    the memory's, whichever is slower.
    """

    kernels: int = 0
    bytes: float = 0
    flops: float = 0
    bound_seconds: float = 0.0

    def add(self, bytes: float, flops: float, rates: Rates) -> None:
        """One more kernel."""
        self += Work(1, bytes, flops, max(bytes / rates.bytes, flops / rates.flops))

    def __iadd__(self, other: Work) -> Work:
        self.kernels += other.kernels
        self.bytes += other.bytes
        self.flops += other.flops
        self.bound_seconds += other.bound_seconds
        return self


@dataclass(frozen=True)
class Rates:
    """Of a device: bytes a second of its memory, and dense bfloat16 operations a second."""

    bytes: float
    flops: float


H100 = Rates(3.35e12, 989e12)
"""H100 SXM, from NVIDIA's data sheet: 80 GB HBM3 at 3.35 TB/s, 1,979 TFLOP/s bfloat16 with sparsity, half without."""


@dataclass
class Counts:
    """Of one step.

    Attributes:
        products: matrix products, convolutions and attention, compiled or not.
        fused: kernels that the compiler makes, by its own estimate of their bytes.
        outside: operations outside compiled graphs that are no products: each at least one kernel.
        casts: those of ``fused`` whose only operation is a conversion to another type.
        calls, rows: of networks, by the objective, and the samples in them.
        graphs: compiled graphs that were called, forward or backward.
        graph_breaks, recompilations: where the compiler gave up; graphs that it made in this step.
        waits: lines of the library that read numbers on the host, which waits for a device.
        collectives: by name, how many, and the bytes of the larger of what goes in and what comes out.
        peak_bytes: most bytes of tensors alive together; inside compiled graphs as if nothing were fused.
    """

    products: Work = field(default_factory=Work)
    fused: Work = field(default_factory=Work)
    outside: Work = field(default_factory=Work)
    casts: int = 0
    calls: int = 0
    rows: int = 0
    graphs: int = 0
    graph_breaks: int = 0
    recompilations: int = 0
    waits: set[str] = field(default_factory=set)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def bound_seconds(self) -> float:
        """What the step needs at least."""
        return sum(work.bound_seconds for work in (self.products, self.fused, self.outside))


@dataclass(frozen=True)
class Graph:
    """Kernels of a compiled graph that the compiler makes itself."""

    fused: Work
    casts: int


class Census(TorchDispatchMode):
    """Counts the operations that run inside it; start a step with :meth:`begin`.

    Numbers that the host reads are 0, and answers yes.

    Args:
        rates: of the device that times are estimated for.
    """

    def __init__(self, rates: Rates = H100) -> None:
        super().__init__()
        self.rates, self.counts = rates, Counts()
        self._alive: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._bytes, self._inside = 0, False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let networks be compiled in here; what the compiler itself does is not seen."""
        return True

    def begin(self) -> None:
        """Forget what was counted, but not what is alive."""
        self.counts = Counts(peak_bytes=self._bytes)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        if CompileContext.try_get() is not None or func.namespace in ("prim", "profiler"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._add_wait(_place())
            return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(leaf, FakeTensor) for leaf in given):
            # The state of a generator, which has numbers: seeds are made of it.
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._add_collective(func, args, out)
        else:
            self._add_operation(func, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _add_wait(self, place: str) -> None:
        # A line that reads several numbers of a tensor waits once.
        if place.split(" ")[0] not in ON_A_CPU_ONLY:
            self.counts.waits.add(place)

    def _add_operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        to_host = func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if to_host and args[0].device.type != "cpu" and not kwargs.get("non_blocking"):
            self._add_wait(_place())
        flops = FORMULAS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        moved = sum(_bytes_of(tensor) for tensor in tensors)
        if flops is not None:
            self.counts.products.add(moved, flops(*args, **kwargs, out_val=out), self.rates)
        elif not self._inside and not func.is_view and func not in NO_KERNEL and tensors:
            self.counts.outside.add(moved, 0, self.rates)

    def _add_collective(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        name = func.overloadpacket.__name__
        if "barrier" not in name and "wait" not in name:
            count, size = self.counts.collectives.get(name, (0, 0))
            sizes = [_bytes_of(leaf) for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            self.counts.collectives[name] = count + 1, size + max(sizes)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._alive:
            size = storage.nbytes()
            self._alive[storage] = size
            self._bytes += size
            weakref.finalize(storage, self._freed, size)
            self.counts.peak_bytes = max(self.counts.peak_bytes, self._bytes)

    def _freed(self, size: int) -> None:
        self._bytes -= size

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Count the network calls of objectives."""
        plain = guidance.predict_with_aux

        def counted(net: Any, x_t: Tensor, *inputs: Any) -> Any:
            self.counts.calls += 1
            self.counts.rows += len(x_t)
            return plain(net, x_t, *inputs)

        with (
            mock.patch.object(guidance, "predict_with_aux", counted),
            mock.patch.object(objective, "predict_with_aux", counted),
        ):
            yield

    def compile(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
        """The backend of ``torch.compile`` that counts a graph's kernels and makes none."""
        inner: Any = self._compile_inner  # whose result is called and no more, as a compiled graph would be
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=options)

    def _compile_inner(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        graph = kernels_of(gm, inputs, self.rates, **kwargs)

        def call(given: list[Any]) -> Any:
            args = list(given)
            given.clear()
            self.counts.graphs += 1
            self.counts.casts += graph.casts
            self.counts.fused += graph.fused
            before, self._inside = self._inside, True
            try:
                return torch.fx.Interpreter(gm).boxed_run(args)
            finally:
                self._inside = before

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


class _Stopped(Exception):
    """The compiler has fused what it fuses."""


def kernels_of(gm: torch.fx.GraphModule, inputs: Sequence[Any], rates: Rates, **kwargs: Any) -> Graph:
    """The kernels that Inductor would make of a graph, for the device of its inputs."""
    found: list[Graph] = []

    def stop(lowered: Any) -> None:
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        fused, casts = Work(), 0
        for node in lowered.scheduler.nodes:
            if node.is_extern() or type(node).__name__ == "NopKernelSchedulerNode":
                continue
            fused.add(node.get_read_write_buffers_sizes(), 0, rates)
            casts += _only_converts(node)
        found.append(Graph(fused, casts))
        raise _Stopped

    with (
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        try:
            compile_fx_inner(gm, inputs, **kwargs)
        except Exception:
            if not found:
                raise
    return found[0]


def _only_converts(node: Any) -> bool:
    origins = {origin.target for each in node.get_nodes() for origin in each.node.get_origins()}
    return origins == {torch.ops.prims.convert_element_type.default}


@contextmanager
def compiled_by(census: Census) -> Iterator[None]:
    """Where ``torch.compile`` is called in here, it only counts."""
    plain = torch.compile

    def counted(model: Any, *, options: Any = None, **kwargs: Any) -> Any:
        return plain(model, backend=partial(census.compile, options=options), **kwargs)

    with mock.patch.object(torch, "compile", counted):
        yield


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Of the CPU's attention, which PyTorch's table lacks."""


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place() -> str:
    """The line of the library that runs, as FUNCTION (FILE:LINE)."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("shortcutflow", "backbones"):
            return f"{frame.f_code.co_name} ({path.relative_to(ROOT)}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
