"""Where a run's data comes from: settings that lead to a folder of shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from shortcutflow.data.manifest import MANIFEST, Manifest


class DataInfo(NamedTuple):
    """What a network must fit.

    Attributes:
        shape: of a sample.
        num_classes: number of labels, or None.
        condition_shape: of the tensor a sample is conditioned on, or None.
    """

    shape: tuple[int, ...]
    num_classes: int | None
    condition_shape: tuple[int, ...] | None = None

    @property
    def is_picture(self) -> bool:
        """Whether samples can be drawn and looked at without more than labels."""
        return len(self.shape) == 3 and self.condition_shape is None

    @property
    def null_y(self) -> float | None:
        """The null condition: the label after the last, zeros for a tensor, None without conditions."""
        return 0.0 if self.condition_shape is not None else self.num_classes


class DataSettings(BaseModel):
    """Settings that every source has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shuffle_buffer: int = Field(default=4096, ge=1, description="samples shuffled among each other")
    cache_bytes: int = Field(default=256 * 2**20, ge=0, description="keep data sets up to this size decoded in memory")


def written_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder of shards, written by ``write`` (given a folder beside it) unless it is complete already.

    Several processes may ask at once: the first to finish is taken, and nobody's complete folder is touched.
    """
    if (folder / MANIFEST).is_file():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    write(unfinished)
    if folder.exists() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder)
    try:
        unfinished.replace(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise
        shutil.rmtree(unfinished)
    return folder


class ShardsData(DataSettings):
    """A folder of shards that were prepared before."""

    kind: Literal["shards"] = "shards"
    folder: Path

    def prepare(self) -> Path:
        """The folder, which must exist."""
        return self.folder

    def describe(self) -> DataInfo:
        """Read from its manifest."""
        manifest = Manifest.read(self.folder)
        return DataInfo(manifest.shape, manifest.num_classes, manifest.condition_shape)
