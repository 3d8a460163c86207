"""What a step costs, by benchmarks/cost.py at tiny sizes: no network call, kernel, wait or recompilation more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost import count, row_of, table_of
from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.data.source import DataInfo, ShardsData
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives import ShortcutObjective

INFO = DataInfo((4, 8, 8), 10)
DEPTH, BATCH, GUIDED = 1, 16, 1


def config(**training: Any) -> RunConfig:
    """Four bootstrap rows of 16, of which one is guided."""
    return RunConfig(
        name="tiny", data=ShardsData(folder=Path("nowhere")),
        backbone=BackboneConfig(name="dit", options={"width": 32, "depth": DEPTH, "heads": 2, "patch": 4}),
        objective=ShortcutObjective(condition_dropout=0.1, guidance_scale=1.5),
        training=TrainingConfig(steps=1, precision="bfloat16", device="cpu", **{"global_batch_size": BATCH} | training),
    )  # fmt: skip


def test_an_eager_step() -> None:
    run = config()
    counts = count(run, info=INFO)
    assert (counts.calls, counts.rows) == (3, 2 * (BATCH // 4 + GUIDED) + BATCH)
    assert [place.split(" ")[0] for place in counts.waits] == ["step_if_finite"]
    # Of each block: modulation, queries with keys and values, attention, its output, two of the perceptron; besides
    # the embeddings of t and d, patches, and the head. Backward two for one, but not for inputs without a gradient.
    forward = 6 * DEPTH + 4 + 1 + 2
    without_gradient = 2 + 1
    attention_is_one = DEPTH
    assert counts.products.kernels == 3 * forward + 2 * forward - without_gradient - attention_is_one
    assert counts.outside.kernels <= 340, "336 with torch 2.13"
    assert counts.peak_bytes > 0
    assert not counts.collectives


def test_a_sharded_step() -> None:
    """Each block is gathered twice for the targets, forward and backward; so is the rest of the network."""
    counts = count(config(parallel="fsdp", global_batch_size=8 * BATCH), ranks=8, info=INFO)
    gathers, scatters = (counts.collectives[name] for name in ("_allgather_base_", "_reduce_scatter_base_"))
    assert (gathers[0], scatters[0]) == (4 * (DEPTH + 1), DEPTH + 1)
    assert counts.collectives["allreduce_"] == (1, 8), "the flags of the finite check and of signals"
    assert len(counts.waits) == 1


@pytest.mark.slow
def test_a_compiled_step() -> None:
    counts = count(config(compile=True), info=INFO)
    assert (counts.graph_breaks, counts.recompilations) == (0, 0)
    assert counts.graphs == 3, "targets with both half steps, forward with the loss, backward"
    assert counts.outside.kernels <= 44, "draws, optimizer, averages and metrics"
    assert len(counts.waits) == 1
    assert counts.fused.kernels <= 156, "152 with torch 2.13"
    assert counts.casts <= 40, "38 with torch 2.13, none of them for targets"
    assert counts.fused.bytes <= 1.7e6, "1.66e6 with torch 2.13"
    assert "| tiny | 1e-05 | 61 |" in table_of([row_of(counts) | {"name": "tiny"}])
