"""The LSTM's layer is PyTorch's, of either cell and in one direction or two."""

from __future__ import annotations

import pytest
import torch

from backbones.lstm import Recurrent
from tests.backbones_contract.cases import IMAGE, TINY, Case


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
        net = Case("lstm", IMAGE, TINY["lstm"].options).build(**options)
        return sum(p.numel() for p in net.blocks[0].mixer.parameters())

    # Two directions of 16 channels, four gates: of input, of state, and two biases.
    assert size() == 2 * 4 * 16 * (32 + 16 + 2)
    assert size(cell="gru") == 3 / 4 * size()
