"""Runs a notebook and writes it down: its outputs into itself, and the same as a page of the documentation.

python notebooks/build.py            # runs it, a minute or two; `make notebook`
python notebooks/build.py --page     # the page alone, from the outputs that it holds
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "shortcut_in_two_dimensions.ipynb"
PAGE = ROOT / "docs" / "two_dimensions.md"
NOT_RUN = "<!-- not run: the notebook is, by tests/test_notebook.py -->"


def execute(path: Path) -> Any:
    """The notebook with fresh outputs; raises the error of a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False).execute()
    return notebook


def page_of(notebook: Any) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook and its outputs, and the pictures that it shows, by their paths beside the page."""
    pictures: dict[str, bytes] = {}
    parts, section = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source.replace("](../docs/", "]("))
            section = (re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE) or [section])[-1]
            continue
        parts.append(f"{NOT_RUN}\n```python\n{cell.source}\n```")
        for kind, content in _shown(cell.outputs):
            if kind == "png":
                name = f"{PAGE.stem}/{len(pictures) + 1}.png"
                pictures[name] = content
                parts.append(f"![{section}]({name})")
            else:
                parts.append(f"```text\n{content.decode().rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _shown(outputs: Any) -> Iterator[tuple[str, bytes]]:
    """The text and the pictures among a cell's outputs."""
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    if text:
        yield "text", text.encode()
    for output in outputs:
        if "image/png" in output.get("data", {}):
            yield "png", base64.b64decode(output.data["image/png"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone, from the outputs there are")
    if not parser.parse_args().page:
        nbformat.write(execute(NOTEBOOK), NOTEBOOK)
    text, pictures = page_of(nbformat.read(NOTEBOOK, as_version=4))
    PAGE.write_text(text)
    for name, content in pictures.items():
        path = PAGE.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB, {len(pictures)} pictures; {PAGE.name}")


if __name__ == "__main__":
    main()
