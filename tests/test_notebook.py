"""The notebook runs and shows what it says; the page made from it is the one in docs."""

from __future__ import annotations

import re
import time
from typing import Any

import nbformat
import pytest

from notebooks.build import NOTEBOOK, PAGE, execute, page_of


def distances(notebook: Any) -> dict[str, dict[int, float]]:
    """By "data, method" and number of steps, the energy distances that a cell has printed."""
    text = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    rows = re.findall(r"^(\w+, [\w ]+): ((?:\d+: [\d.-]+(?:, )?)+)$", text, re.MULTILINE)
    return {name: {int(n): float(v) for n, v in re.findall(r"(\d+): ([\d.-]+)", row)} for name, row in rows}


def check(notebook: Any) -> None:
    """In one step the shortcut model is near the data and flow matching is not; in 128 steps both are."""
    measured = distances(notebook)
    for data in ("moons", "checkerboard"):
        shortcut, flow = measured[f"{data}, shortcut"], measured[f"{data}, flow matching"]
        assert flow[1] > 5 * shortcut[1]
        assert max(flow[128], shortcut[128]) < 0.02


def test_the_page_is_the_notebook() -> None:
    assert NOTEBOOK.stat().st_size < 700_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text, pictures = page_of(notebook)
    assert PAGE.read_text() == text, "make notebook writes both"
    assert {name: (PAGE.parent / name).read_bytes() for name in pictures} == pictures
    assert len(pictures) == 5
    check(notebook)


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    start = time.perf_counter()
    check(execute(NOTEBOOK))
    assert time.perf_counter() - start < 600, "3 minutes on quiet cores"
