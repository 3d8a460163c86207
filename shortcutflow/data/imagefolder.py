"""Pictures of one's own as a run's data: prepared as shards the first time they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from shortcutflow.data.images import Crop, ImageFormat
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.preparation import Preparation
from shortcutflow.data.prepare import prepare
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.labels import LabelChoice


class ImageFolderData(DataSettings):
    """Raw pictures (see :mod:`shortcutflow.data.sources`), written as shards into ``folder`` the first time.

    Large data sets are better prepared before, by ``shortcutflow prepare``: the processes of a run wait for each other.
    """

    kind: Literal["imagefolder"] = "imagefolder"
    path: Path = Field(description="folder or archive of pictures")
    size: int = Field(ge=1, le=4096, description="side in pixels")
    crop: Crop = "released"
    format: ImageFormat | None = Field(default=None, description="null: png up to 64 pixels, jpg above")
    quality: int = Field(default=95, ge=1, le=100)
    labels: LabelChoice = Field(default=True, description="true: those that are there; false: none; or which")
    order_seed: int = Field(default=0, description="of the order in the shards")
    samples_per_shard: int = Field(default=4096, ge=1)
    folder: Path | None = Field(default=None, description="for the shards; null: data/NAME-SIZE")

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self.folder or Path("data") / f"{self.path.name.partition('.')[0] or 'pictures'}-{self.size}"

    def prepare(self) -> Path:
        """Write the shards unless they are there; returns their folder. Several processes may call at once.

        Finished shards are enough: the raw pictures may be gone. Where they are, they must be those of the shards.

        Raises:
            FileNotFoundError, ValueError: see :func:`~shortcutflow.data.prepare.prepare`.
        """
        found = Preparation.read(self.shards) if (self.shards / MANIFEST).is_file() else None
        if found is not None and not self.path.exists():
            if found.path and found.path != str(self.path.resolve()):
                raise ValueError(
                    f"{self.shards} holds the pictures of {found.path}, data.path is {self.path}: name another "
                    f"data.folder, or train on these with data.kind=shards data.folder={self.shards}"
                )
            return self.shards
        prepare(
            self.path, self.shards, size=self.size, crop=self.crop, format=self.format, quality=self.quality,
            labels=self.labels, seed=self.order_seed, samples_per_shard=self.samples_per_shard,
        )  # fmt: skip
        return self.shards

    def describe(self) -> DataInfo:
        """Three channels; the classes from the manifest, or from a list of the raw pictures before there is one."""
        if (self.shards / MANIFEST).is_file():
            manifest = Manifest.read(self.shards)
            return DataInfo(manifest.shape, manifest.num_classes)
        names = open_source(self.path, labels=self.labels).class_names
        return DataInfo((3, self.size, self.size), len(names) or None)
