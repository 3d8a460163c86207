"""Inputs and options that do not fit: every network says which, and what it would take."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import backbones
from tests.backbones_contract.cases import CLASSES, IMAGE, SEQUENCE, TINY, Case, every_case

# ---- inputs

OUT_OF_RANGE = [
    ({"t": torch.full((4,), 1.5)}, r"t must lie in \[0, 1\], got 1\.5 to 1\.5"),
    ({"t": torch.tensor([0, 0.5, 0.5, -0.25])}, r"t must lie in \[0, 1\], got -0\.25 to 0\.5"),
    ({"t": torch.full((4,), float("nan"))}, r"t must lie in \[0, 1\], got nan"),
    ({"d": torch.full((4,), 7.0)}, r"d must lie in \[0, 1\], got 7 to 7"),
    ({"d": torch.full((4,), -0.5)}, r"d must lie in \[0, 1\], got -0\.5"),
    ({"y": torch.tensor([0, 1, 2, CLASSES + 1])}, rf"y must lie in \[0, {CLASSES}\], got 0 to {CLASSES + 1}"),
    ({"y": torch.tensor([0, 1, 2, -1])}, rf"y must lie in \[0, {CLASSES}\], got -1 to 2"),
    ({"y": torch.zeros(4)}, r"y must be whole numbers of shape \(4,\), got torch.float32"),
    ({"y": torch.zeros(3).long()}, r"y must be whole numbers of shape \(4,\), got torch.int64 \(3,\)"),
    ({"t": torch.tensor(0.5)}, r"t and d must have shape \(4,\), got \(\) and \(4,\)"),
    ({"d": torch.zeros(4, 1)}, r"t and d must have shape \(4,\), got \(4,\) and \(4, 1\)"),
]


@every_case
@pytest.mark.parametrize(("changed", "message"), OUT_OF_RANGE, ids=[message[:24] for _, message in OUT_OF_RANGE])
def test_input_that_is_refused(case: Case, changed: dict[str, Tensor], message: str) -> None:
    """Another package's network may word it as it likes, naming the input."""
    net, given = case.build(), dict(zip(("x_t", "t", "d", "y"), case.inputs(), strict=True))
    net(*given.values())
    (name,) = changed
    with pytest.raises(ValueError, match=message if case.family in TINY else rf"\b{name}\b"):
        net(*(given | changed).values())


# ---- options

TOKEN_MODELS = [
    ({"patch": 3}, r"patch must divide the sizes \(8, 8\), got 3; 1 always does"),
    ({"patch": 0}, r"patch must divide .* got 0"),
    ({"shape": (3, 8, 6), "patch": 4}, r"patch must divide the sizes \(8, 6\), got 4"),
    ({"shape": (9, 4)}, r"patch must divide the sizes \(9,\), got 2"),
    ({"width": 30}, "width must be a multiple of 4 for 2-D positions, got 30"),
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"depth": 0}, "depth must be at least 1, got 0"),
]
HEADS = [
    ({"heads": 3}, "heads must divide width: width 32, heads 3"),
    ({"heads": 0}, "heads must be at least 1, got 0"),
]
ANY = [
    ({"shape": (8,)}, r"\(channels, height, width\) or \(length, channels\), got \(8,\)"),
    ({"shape": (1, 3, 8, 8)}, r"\(channels, height, width\) or .*, got \(1, 3, 8, 8\)"),
    ({"shape": (0, 8, 8)}, r"got \(0, 8, 8\)"),
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"finest_steps": 0}, "finest_steps must be at least 1, got 0"),
    ({"num_classes": 3, "condition_shape": (2,)}, r"num_classes \(3\) or condition_shape \(\(2,\)\), not both"),
]
LSTM = [
    ({"cell": "rnn"}, "cell must be one of 'lstm', 'gru', got 'rnn'"),
    # Of two directions each has half of the width; positions have sines and cosines.
    ({"shape": SEQUENCE, "width": 33}, r"width must be (even|a multiple of 2) .*, got 33"),
]
MAMBA = [({option: 0}, f"{option} must be at least 1, got 0") for option in ("state", "conv", "expand")]
UNET = [
    ({"kernel": 4}, "kernel must be odd, got 4"),
    ({"kernel": 0}, "kernel must be odd, got 0"),
    ({"attention_levels": (2,)}, r"attention_levels must lie in 0 ... 1, got 2"),
    ({"attention_levels": (-1,)}, r"attention_levels must lie in 0 ... 1, got -1"),
    ({"head_width": 12}, "head_width must divide .* level 1 has 32, head_width is 12"),
    ({"multipliers": (1, 3), "attention_levels": (0,), "head_width": 32, "width": 32, "stages": 0}, "stages must be"),
    ({"width": 32, "multipliers": (2, 1), "attention_levels": (0,), "head_width": 64}, "the middle, 32, got 64"),
    ({"multipliers": ()}, "each multiplier must be at least 1, got 0"),
    ({"multipliers": (1, 0)}, "each multiplier must be at least 1, got 0"),
    ({"width": 0}, "width must be at least 1, got 0"),
]
OPTIONS = {
    "dit": [*ANY, *TOKEN_MODELS, *HEADS],
    "lstm": [*ANY, *TOKEN_MODELS, *LSTM],
    "mamba": [*ANY, *TOKEN_MODELS, *MAMBA],
    "transformer": [*ANY, *TOKEN_MODELS, *HEADS],
    "unet": [*ANY, *UNET],
}


def params() -> Iterator[Any]:
    for family in OPTIONS:
        for options, message in OPTIONS[family]:
            told = "-".join(f"{key}={value}" for key, value in options.items())
            yield pytest.param(family, options, message, id=f"{family}-{told}")


@pytest.mark.parametrize(("family", "options", "message"), list(params()))
def test_option_that_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    tiny, required = TINY[family], TINY[family].requires
    if required is not None:
        pytest.importorskip(required)
    given = {"shape": IMAGE} | tiny.options
    backbones.create(family, **given)
    with pytest.raises(ValueError, match=message):
        backbones.create(family, **(given | options))


def test_an_option_that_the_builder_lacks_is_named() -> None:
    for family in OPTIONS:
        with pytest.raises(ValueError, match=rf"backbone '{family}': got an unexpected keyword argument 'widht'"):
            backbones.create(family, shape=IMAGE, widht=64)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when the network is built, with the command that helps; its name is known all the same."""
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    assert "transformer" in backbones.names()
    with pytest.raises(ImportError, match=re.escape("pip install 'shortcutflow[transformer]'")):
        backbones.create("transformer", shape=IMAGE, **TINY["transformer"].options)
