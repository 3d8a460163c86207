"""A model's sampler as an ONNX file, which onnxruntime and others run without PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcutflow import __version__
from shortcutflow.interop.exportable import ExportableSampler

OPSET = 18
"""Version of ONNX's operators; onnxruntime knows it since 1.14."""


def write_onnx(sampler: ExportableSampler, path: Path) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Write (noise, y) -> samples; weights above 2 GB lie beside the file, in NAME.data.

    Returns:
        What runs the file, or None without onnxruntime.

    Raises:
        ValueError: if the network cannot be traced or has no translation.
    """
    import onnx_ir

    program = sampler.trace()
    try:
        with warnings.catch_warnings(action="ignore"):
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
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(["batch", *value.shape[1:]])  # the tracer calls it by a symbol
    # The exporter notes source files and lines of this machine.
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(out for node in nodes for out in node.outputs)]
    for part in (model.graph, *nodes, *values, *model.functions.values()):
        part.metadata_props.clear()
    model.metadata_props.update(sampler.metadata())
    written.save(path)
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(noise: Tensor, y: Tensor | None) -> Tensor:
        given = {"noise": noise.numpy()} | ({} if y is None else {"y": y.numpy()})
        return torch.from_numpy(session.run(["samples"], given)[0])

    return run


def _searchsorted(sorted_sequence: Any, self: Any, **options: Any) -> Any:
    """How many of the sorted numbers (n,) are below each of self (b,), for which the exporter has no translation."""
    import onnxscript

    if any(options.values()):
        raise NotImplementedError(f"searchsorted with {options}")
    ops: Any = onnxscript.opset18
    last = ops.Constant(value_ints=[-1])
    below = ops.Less(sorted_sequence, ops.Unsqueeze(self, last))
    return ops.ReduceSum(ops.Cast(below, to=7), last, keepdims=0)  # 7 is int64
