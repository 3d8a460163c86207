"""Every backbone's shard plan under FSDP2: two processes hold half of it each and give what one holds whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from backbones.backbone import Backbone
from shortcutflow.network import predict_data
from tests.backbones_contract.cases import FIRST, Case
from tests.processes import run_forked


def shard(net: Backbone) -> Backbone:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in net.shard_plan():
        fully_shard(unit, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def compare(folder: Path) -> None:
    """Each network sharded beside the whole one; what differs is written down."""
    dist.init_process_group("gloo")
    problems = []
    # The first also as one that predicts data.
    chosen: list[tuple[Case, Callable[[Any], Any]]] = [
        (FIRST[0], predict_data),
        *((case, lambda net: net) for case in FIRST),
    ]
    for case, converted in chosen:
        name = case.family
        whole = converted(case.awake())
        expected = whole(*case.inputs())
        with torch.device("meta"):
            sharded = shard(converted(case.build()))
        sharded.to_empty(device="cpu").reset_parameters()
        if not all(p.isfinite().all() for p in (q.to_local() for q in sharded.parameters() if isinstance(q, DTensor))):
            problems.append(f"{name}: reset_parameters left something out")
        set_model_state_dict(
            sharded, whole.state_dict(), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        )
        out = sharded.eval()(*case.inputs())
        if not torch.allclose(out, expected, atol=1e-4, rtol=1e-4):
            problems.append(f"{name}: off by {(out - expected).abs().max():g}")
        out.square().mean().backward()
        whole_out = whole(*case.inputs())
        whole_out.square().mean().backward()
        for (key, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            if not p.requires_grad:
                continue
            assert isinstance(q.grad, DTensor), key
            if not torch.allclose(q.grad.full_tensor(), p.grad, atol=1e-4, rtol=1e-3):
                problems.append(f"{name}: gradient of {key}")
        held = sum(q.to_local().numel() for q in sharded.parameters() if isinstance(q, DTensor))
        if held > 0.7 * sum(p.numel() for p in whole.parameters()):
            problems.append(f"{name}: a process holds more than its share")
    (folder / f"{dist.get_rank()}.txt").write_text("\n".join(problems))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without distributed")
def test_sharded_equals_whole(tmp_path: Path) -> None:
    done = run_forked(compare, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(FIRST) >= 6
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text() == ""
