"""A model's sampler as an ONNX file, which onnxruntime and others run without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcutflow import __version__
from shortcutflow.interop.exports.exportable import ExportableSampler, without_warnings
from shortcutflow.io.atomic import atomic_output

OPSET = 18
"""Version of ONNX's operators; onnxruntime knows it since 1.14."""


def export_onnx(
    folder: Path,
    out: Path,
    *,
    weights: str | None = None,
    steps: int | Sequence[float] = 1,
    guidance_scale: float = 1.0,
    decoder: str | None = None,
) -> str:
    """Write (noise, y) -> samples for a fixed number of steps; returns a summary in one line.

    The inputs are ``noise`` (batch, *shape) float32 and, if the model has conditions, ``y``: labels (batch,) int64 or
    (batch, *condition_shape) float32. The output is ``samples``. Weights above 2 GB lie beside the file, in NAME.data.

    Args: as of :func:`shortcutflow.interop.exports.to_program.export_program`, the name ending in .onnx.

    Raises:
        ImportError: without onnx and onnxscript.
        ValueError: if the network cannot be traced or has no translation, the model cannot do the steps or the
            guidance, or the file gives other samples than the library.
        FileExistsError: if the file exists.
    """
    if out.suffix != ".onnx":
        raise ValueError(f"--out {out}: the name of an ONNX file must end in .onnx")
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"writing ONNX needs {' and '.join(missing)}: pip install 'shortcutflow[onnx]'")
    with atomic_output(out) as path:
        sampler = ExportableSampler.load(
            folder, weights=weights, steps=steps, guidance_scale=guidance_scale, decoder=decoder
        )
        _write(sampler, path)
        compared = "not compared with the library's sampler, as onnxruntime is not installed"
        if find_spec("onnxruntime") is not None:
            compared = f"differs from the library's sampler by {sampler.check(_runner(path)):.1g} at most"
    return f"{out}: {len(sampler.sizes)}-step sampler, {compared}"


def _write(sampler: ExportableSampler, path: Path) -> None:
    program = sampler.trace()
    try:
        with without_warnings():
            written: Any = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, output_names=["samples"], verbose=False,
                custom_translation_table={torch.ops.aten.searchsorted.Tensor: _searchsorted},
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        name = sampler.model.config.backbone.name
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"backbone {name!r} has no translation into ONNX: {reason[:300]}") from error
    model = written.model
    model.producer_name, model.producer_version = "shortcutflow", __version__
    model.doc_string = "A shortcut model's sampler: noise, and y if there is one, to samples."
    _name_batch(model)
    _forget_sources(model)
    model.metadata_props.update(sampler.metadata())
    written.save(path)


def _searchsorted(sorted_sequence: Any, self: Any, **options: Any) -> Any:
    """How many of the sorted numbers (n,) are below each of self (b,), for which the exporter has no translation."""
    import onnxscript

    if any(options.values()):
        raise NotImplementedError(f"searchsorted with {options}")
    ops: Any = onnxscript.opset18
    last = ops.Constant(value_ints=[-1])
    below = ops.Less(sorted_sequence, ops.Unsqueeze(self, last))
    return ops.ReduceSum(ops.Cast(below, to=7), last, keepdims=0)  # 7 is int64


def _name_batch(model: Any) -> None:
    """Call the free axis of inputs and outputs "batch", which the tracer calls by a symbol."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(["batch", *value.shape[1:]])


def _forget_sources(model: Any) -> None:
    """Drop notes that the exporter makes of source files and lines on this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    for function in model.functions.values():
        function.metadata_props.clear()


def _runner(path: Path) -> Callable[[Tensor, Tensor | None], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(noise: Tensor, y: Tensor | None) -> Tensor:
        given = {"noise": noise.numpy()} | ({} if y is None else {"y": y.numpy()})
        return torch.from_numpy(session.run(["samples"], given)[0])

    return run
