"""The LSTM's own options: which tokens see which, and that its layer is PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backbones.lstm import Recurrent
from tests.backbones_contract.cases import IMAGE, SEQUENCE, TINY, Case

TINY_LSTM = TINY["lstm"].options | {"patch": 1}


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


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("shape", [SEQUENCE, (2, 2, 4)], ids=str)
@torch.no_grad()
def test_no_token_sees_a_later_one_if_causal(shape: tuple[int, ...], cell: str) -> None:
    everything = torch.ones(8, 8, dtype=torch.bool)
    case = Case("lstm", shape, TINY_LSTM | {"cell": cell})
    assert torch.equal(reach(case), everything)
    assert torch.equal(reach(case.of(shape, causal=True)), everything.tril())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_layer_is_that_of_pytorch(cell: str, causal: bool) -> None:
    torch.manual_seed(0)
    hidden = 6 if causal else 3
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](6, hidden, batch_first=True, bidirectional=not causal)
    ours = Recurrent(6, cell, causal)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_widths_of_two_directions() -> None:
    with pytest.raises(ValueError, match="width must be even for two directions, got 33"):
        Recurrent(33)
    assert Recurrent(33, causal=True).hidden == 33


def test_cells_have_their_sizes() -> None:
    def size(**options: str) -> int:
        net = Case("lstm", IMAGE, TINY_LSTM).build(**options)
        return sum(p.numel() for p in net.blocks[0].mixer.parameters())

    # Two directions of 16 channels, four gates: of input, of state, and two biases.
    assert size() == 2 * 4 * 16 * (32 + 16 + 2)
    assert size(cell="gru") == 3 / 4 * size()
