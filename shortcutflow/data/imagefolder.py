"""Images of one's own as a run's data: prepared as shards the first time they are needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from shortcutflow.data.images import Crop, ImageFormat
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.prepare import ImageOptions, Preparation, absolute, prepare
from shortcutflow.data.remote import PathOrUrl, is_url
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.labels import LabelChoice


class ImageFolderData(DataSettings):
    """Raw images (see :mod:`shortcutflow.data.sources`), written as shards into ``folder`` the first time.

    Large data sets are better prepared before, by ``shortcutflow prepare``: the processes of a run wait for each other.
    """

    kind: Literal["imagefolder"] = "imagefolder"
    path: PathOrUrl = Field(description="folder, archive or parquet files of images; URLs of these")
    size: int = Field(ge=1, le=4096, description="side in pixels")
    crop: Crop = "released"
    format: ImageFormat | None = Field(default=None, description="null: png up to 64 pixels, jpg above")
    quality: int = Field(default=95, ge=1, le=100)
    labels: LabelChoice = Field(default=True, description="true: those that are there; false: none; or which")
    encoding: str | None = Field(default=None, description="of names in archives that are not UTF-8, such as gbk")
    order_seed: int = Field(default=0, description="of the order in the shards")
    samples_per_shard: int = Field(default=4096, ge=1)
    folder: Path | None = Field(default=None, description="for the shards; null: data/NAME-SIZE")
    cache: Path = Field(default=Path("data/cache"), description="for the files of URLs")

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        name = re.split(r"[.{*?]", Path(self.path).name)[0].rstrip("-_")
        return self.folder or Path("data") / f"{name or 'images'}-{self.size}"

    def prepare(self) -> Path:
        """Write the shards unless they are there; returns their folder. Several processes may call at once.

        Finished shards are enough: the raw images may be gone, and URLs are not fetched again. Raw images that are
        there must be those of the shards.

        Raises:
            FileNotFoundError, ValueError: see :func:`~shortcutflow.data.prepare.prepare`.
        """
        found = Preparation.read(self.shards) if (self.shards / MANIFEST).is_file() else None
        if found is not None and (is_url(self.path) or not Path(self.path).exists()):
            if found.path not in ("", absolute(self.path)):
                raise ValueError(
                    f"{self.shards} holds the images of {found.path}, data.path is {self.path}: name another "
                    f"data.folder, or train on these with data.kind=shards data.folder={self.shards}"
                )
            return self.shards
        options = self.model_dump(include={*ImageOptions.model_fields})
        prepare(self.path, self.shards, seed=self.order_seed, cache=self.cache, **options)
        return self.shards

    def describe(self) -> DataInfo:
        """Three channels; the classes from the manifest, or from a list of the raw images before there is one."""
        if (self.shards / MANIFEST).is_file():
            manifest = Manifest.read(self.shards)
            return DataInfo(manifest.shape, manifest.num_classes)
        names = open_source(self.path, labels=self.labels, encoding=self.encoding, cache=self.cache).class_names
        return DataInfo((3, self.size, self.size), len(names) or None)
