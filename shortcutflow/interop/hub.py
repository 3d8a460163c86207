"""Models on the Hugging Face hub. Needs ``pip install 'shortcutflow[hub]'``; import it only where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from huggingface_hub import ModelCard, ModelHubMixin
except ImportError as error:
    raise ImportError("models on the hub need huggingface_hub: pip install 'shortcutflow[hub]'") from error

from shortcutflow.interop.model_card import card_text
from shortcutflow.models.model import Model, download, load

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
        return ModelCard(card_text(self.model.config, self.model.folder, name or self.model.folder.name or "model"))

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        of_hub = {name: options.pop(name, None) for name in HUB_OPTIONS}
        folder = Path(model_id) if Path(model_id).is_dir() else download(model_id, **of_hub)
        return cls(load(folder, **options))
