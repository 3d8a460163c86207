"""How a run computes: the process-wide switches of PyTorch, set for the run and put back after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def switches(*, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Set the precision of float32 products on a GPU, and whether kernels must repeat their sums in the same order.

    Args:
        tf32: use tensor cores with 10 bits of mantissa.
        deterministic: raise an error from an operator that has no deterministic kernel.
    """
    cudnn: Any = torch.backends.cudnn
    precisions: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [each.fp32_precision for each in precisions]
    was_deterministic, was_benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for each in precisions:
            each.fp32_precision = "tf32" if tf32 else "ieee"
        if deterministic:
            # cuBLAS reads it when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        cudnn.benchmark = was_benchmark
        for each, precision in zip(precisions, before, strict=True):
            each.fp32_precision = precision
