"""Models on the Hugging Face hub. Needs ``pip install 'shortcutflow[hub]'``; import it only where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from huggingface_hub import ModelCard, ModelHubMixin
except ImportError as error:
    raise ImportError("models on the hub need huggingface_hub: pip install 'shortcutflow[hub]'") from error

from shortcutflow.io.json import read_object
from shortcutflow.models.config import REPORTS
from shortcutflow.models.model import Model, download, load

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
HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
"""What the mixin passes on to the hub's client; all else is for :func:`shortcutflow.load`."""


class HubModel(ModelHubMixin, library_name="shortcutflow"):
    """A model with the hub's ``push_to_hub``, ``save_pretrained`` and ``from_pretrained``.

    >>> HubModel(shortcutflow.load("runs/digits/first")).push_to_hub("me/digits")
    >>> model = HubModel.from_pretrained("me/digits").model

    Args:
        model: as :func:`shortcutflow.load` returns it.
    """

    # Not None, or the mixin would look for a config among the arguments and copy the network for it.
    _hub_mixin_config: Any = {}  # noqa: RUF012

    def __init__(self, model: Model) -> None:
        self.model = model
        self._name: str | None = None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with its card; options as of ``ModelHubMixin.push_to_hub``. Gives the commit's address."""
        options["model_card_kwargs"] = {"name": repo_id, **(options.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *_: Any, name: str | None = None, **__: Any) -> ModelCard:
        """The card: network, data, quality by number of steps, samples."""
        return ModelCard(card_text(self.model, name or self.model.folder.name or "model"))

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        of_hub = {name: options.pop(name, None) for name in HUB_OPTIONS}
        folder = Path(model_id) if Path(model_id).is_dir() else download(model_id, **of_hub)
        return cls(load(folder, **options))


def card_text(model: Model, name: str) -> str:
    """A model's card in Markdown, with what was measured in its folder; the name is a hub id or a folder to load."""
    config, folder = model.config, model.folder
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
        ["predicts", "data" if config.backbone.prediction == "data" else None],
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
    texts = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    rows_of = [" | ".join(text.replace("|", "\\|").replace("\n", " ") for text in line) for line in texts]
    return "".join(f"| {row} |\n" for row in rows_of)
