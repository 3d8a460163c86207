"""Which tokens an output depends on: all, or none that comes later if the network is causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backbones_contract.cases import SEQUENCE, TINY, Case


def reach(case: Case) -> torch.Tensor:
    """(n, n): whether the token of the row depends on that of the column; an image's are its pixels, in rows."""
    net: Any = case.awake()
    x_t, t, d, y = case.inputs(batch=1)

    def per_token(x: torch.Tensor) -> torch.Tensor:
        return x[0].flatten(1).T if case.is_image else x[0]

    before, columns = net(x_t, t, d, y), []
    for i in range(len(per_token(x_t))):
        changed = x_t.clone()
        per_token(changed)[i] += 1  # a view
        columns.append(per_token(net(changed, t, d, y) - before).any(dim=1))
    return torch.stack(columns, dim=1)


EVERYTHING = torch.ones(8, 8, dtype=torch.bool)
CAUSAL = [
    ("lstm", {}, {"causal": True}),
    ("lstm", {"cell": "gru"}, {"cell": "gru", "causal": True}),
    ("mamba", {}, {"bidirectional": False}),
]


@pytest.mark.parametrize(("family", "both_ways", "causal"), CAUSAL, ids=["lstm", "gru", "mamba"])
@pytest.mark.parametrize("shape", [SEQUENCE, (2, 2, 4)], ids=str)
@torch.no_grad()
def test_no_token_sees_a_later_one_if_causal(
    shape: tuple[int, ...], family: str, both_ways: dict[str, Any], causal: dict[str, Any]
) -> None:
    case = Case(family, shape, TINY[family].options | {"patch": 1})
    assert torch.equal(reach(case.of(shape, **both_ways)), EVERYTHING)
    assert torch.equal(reach(case.of(shape, **causal)), EVERYTHING.tril())
