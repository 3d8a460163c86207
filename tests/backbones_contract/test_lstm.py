"""The LSTM's layer is PyTorch's, of either cell and in one direction or two."""

from __future__ import annotations

import pytest
import torch

from backbones.lstm import Recurrent
from backbones.recurrence import recurrent_layer, run_layer
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


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_autocast_leaves_the_layer_in_float32(cell: str) -> None:
    """Called eagerly and as the operator of a compiled network."""
    layer = Recurrent(8, cell)
    layer.reset_parameters()
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [f(x.bfloat16(), list(layer.parameters()), cell, True) for f in (run_layer, recurrent_layer)]
    expected = run_layer(x.bfloat16().float(), list(layer.parameters()), cell, True)
    for out in outputs:
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected)
