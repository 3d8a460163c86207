"""The card of a model: what it is, what it was trained on, what was measured, and how to sample it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortcutflow.io.json import read_object
from shortcutflow.models.config import REPORTS, ModelConfig

HEADER = """---
library_name: shortcutflow
pipeline_tag: {pipeline}
tags:
- shortcut-models
- flow-matching
- few-step
---
"""
USE = """## Use

```python
import shortcutflow

model = shortcutflow.load("{name}")
samples = model.sample({call})
```

`steps` may be any number; one step costs one evaluation of the network. Nothing in this repository is code: the config
names a network of the installed library, the weights are safetensors.
"""


def card_text(config: ModelConfig, folder: Path, name: str) -> str:
    """The card in Markdown.

    Args:
        config: of the model.
        folder: which may hold what was measured (evaluation.json) and an image (samples.png).
        name: a heading, and what to load: a hub id or a folder.
    """
    pipeline = "unconditional-image-generation" if len(config.shape) == 3 else "other"
    parts = [
        HEADER.format(pipeline=pipeline),
        f"# {name}\n",
        "A shortcut model: one network that samples in any number of steps.\n",
    ]
    if (folder / "samples.png").is_file():
        parts.append("![samples](samples.png)\n")
    call = "16, steps=4" if config.num_classes is None else "16, y=0, steps=4"
    parts += [USE.format(name=name, call=call), "## Network\n"]
    facts: list[list[Any]] = [["backbone", f"`{config.backbone.name}`"], *map(list, config.backbone.options.items())]
    facts += [
        ["shape of a sample", config.shape], ["finest steps in training", config.finest_steps],
        ["labels", config.num_classes], ["latents of", f"`{config.vae}`" if config.vae else None],
        ["optimizer steps", config.step], ["weights", ", ".join(config.weights)],
        ["loaded by default", config.default_weights],
    ]  # fmt: skip
    parts.append(_table(["", ""], [fact for fact in facts if fact[1] is not None]))
    if config.about:
        parts += ["## Data and training\n", _table(["", ""], [list(item) for item in config.about.items()])]
    if reports := [report for path in sorted(folder.glob(REPORTS)) if (report := _report(path))]:
        parts += ["## Quality by number of steps\n", *reports]
    return "\n".join(parts)


def _report(path: Path) -> str | None:
    """A table of an evaluation's rows, and how they were measured; None for a file that is no report."""
    try:
        report = read_object(path, "an evaluation")
        rows = [{"steps": row["steps"]} | row["values"] for row in report["rows"]]
    except (ValueError, KeyError, TypeError):
        return None
    if not rows:
        return None
    table = _table(list(rows[0]), [[row.get(name, "") for name in rows[0]] for row in rows])
    subject = report["subject"] if isinstance(report.get("subject"), dict) else {}
    topics = ("protocol", "samples", "guidance_scale", "weights", "step")
    facts: dict[str, Any] = {topic: (report | subject)[topic] for topic in topics if topic in report | subject}
    if isinstance(facts.get("protocol"), dict):
        facts["protocol"] = f"{facts['protocol'].get('name')} ({facts['protocol'].get('description')})"
    return table + "\n" + "; ".join(f"{topic}: {words}" for topic, words in facts.items()) + "\n"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
