"""Where a run's data comes from: settings that lead to a folder of shards."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shortcutflow.conditions import select
from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.data.manifest import LatentsInfo
from shortcutflow.data.remote import PathOrUrl
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.stream import BatchStream, ShardStream
from shortcutflow.io.atomic import write_whole
from shortcutflow.io.json import read_object, wrong_fields
from shortcutflow.types import Batch

INFO_FILE = "data.json"
"""In a run's folder: a :class:`DataInfo`."""


class DataInfo(NamedTuple):
    """What a network must fit.

    Attributes:
        shape: of a sample.
        num_classes: number of labels, or None.
        condition_shape: of the tensor a sample is conditioned on, or None.
        vae: hub id or folder of the autoencoder whose latents the samples are, or None.
        latents: how they were made; None if that is not known, or for other samples.
    """

    shape: tuple[int, ...]
    num_classes: int | None
    condition_shape: tuple[int, ...] | None = None
    vae: str | None = None
    latents: LatentsInfo | None = None

    @property
    def is_picture(self) -> bool:
        """Whether samples can be drawn and looked at without more than labels."""
        return len(self.shape) == 3 and self.condition_shape is None

    @property
    def null_y(self) -> float | None:
        """The null condition: the label after the last, zeros for a tensor, None without conditions."""
        return 0.0 if self.condition_shape is not None else self.num_classes

    def save(self, folder: Path) -> None:
        """Write it into a run's folder, so that the run can be sampled where its data is not."""
        latents = None if self.latents is None else self.latents.model_dump()
        write_whole(folder / INFO_FILE, json.dumps(self._asdict() | {"latents": latents}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> DataInfo | None:
        """Read it from a run's folder, or None if the run kept none; raises ValueError if the file does not hold it."""
        path = folder / INFO_FILE
        if not path.is_file():
            return None
        try:
            return TypeAdapter(cls).validate_python(read_object(path, "a run's data"))
        except ValidationError as error:
            raise ValueError(f"{path} does not describe a run's data: {wrong_fields(error)}") from error

    def require_same_latents(self, kept: DataInfo) -> None:
        """Raise ValueError if these are latents of another autoencoder than those that a run began with."""
        before, now = kept.latents, self.latents
        if before != now and (before is None or before.differing(now)):
            raise ValueError(
                f"this run was trained on {before or 'no latents'}, its data now holds {now or 'no latents'}: resume "
                "it with the data that it began with, or begin a new run with start=RUN"
            )


class DataSource(BaseModel, ABC):
    """Base of the data sources that a config can name; a subclass declares ``kind: Literal["NAME"] = "NAME"``.

    Another package's are found by the entry-point group ``shortcutflow.data``: ``NAME = "module:Class"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    @abstractmethod
    def describe(self) -> DataInfo:
        """Shape and conditions of a sample, before any is read."""

    @abstractmethod
    def open_stream(
        self, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> BatchStream:
        """A rank's rows of global batches of ``batch_size`` samples."""

    def as_stored(self) -> Self:
        """The same samples without augmentation, read in this process; what plots and statistics open."""
        return self

    def first(self, count: int, *, seed: int = 0) -> Batch:
        """The first samples of the first epoch in a seed's order, as they are stored, the same in every process.

        Raises:
            ValueError: for a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return self.as_stored().open_stream(batch_size=count, seed=seed).batch_at(0)

    def one_epoch(self, *, batch_size: int = 512) -> Iterator[Batch]:
        """Every sample once, as it is stored, always in the same order. Latents are those of one draw."""
        stream = self.as_stored().open_stream(batch_size=batch_size, seed=0)
        for start in range(0, stream.samples, batch_size):
            batch, left = stream.batch_at(start), stream.samples - start
            # The last batch goes on into the next epoch.
            yield Batch(batch.data[:left], None if batch.y is None else select(batch.y, slice(left)), batch.keys[:left])


class DataSettings(DataSource):
    """A source of shards; :class:`~shortcutflow.data.stream.ShardStream` says what the settings do."""

    shuffle_buffer: int | None = Field(
        default=None, ge=1, description="samples shuffled among each other, by whole shards; null: those of up to 8"
    )
    horizontal_flip: bool = Field(default=False, description="mirror samples, drawn from (seed, epoch, sample)")
    cache_bytes: int = Field(default=256 * 2**20, ge=0, description="keep data sets up to this size decoded in memory")
    workers: int | None = Field(default=None, ge=0, description="processes that read ahead; null: cores to spare")
    on_error: Literal["skip", "raise"] = Field(default="skip", description="what a sample that cannot be read does")

    def prepare(self) -> Path | str:
        """Make sure that the shards are there; returns their folder, or its URL."""
        raise NotImplementedError

    def open_folder(self) -> ShardFolder:
        """The folder of shards, prepared if need be."""
        return ShardFolder(self.prepare())

    def opened(self) -> ShardFolder:
        """The same, opened once a process, and again if its files have changed."""
        # How samples are read changes no folder.
        key = f"{Path.cwd()}: {self.model_dump_json(exclude=READING)}"
        if key not in _OPENED or _OPENED[key].has_changed():
            _OPENED[key] = self.open_folder()
        return _OPENED[key]

    def describe(self) -> DataInfo:
        """What the manifest says."""
        manifest = self.opened().manifest
        vae = manifest.latents.vae if manifest.latents is not None else None
        return DataInfo(manifest.shape, manifest.num_classes, manifest.condition_shape, vae, manifest.latents)

    def open_stream(
        self, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> BatchStream:
        """A rank's rows of global batches of this size."""
        return ShardStream(
            self.opened(), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, device=device,
            **self.model_dump(include=READING),
        )  # fmt: skip

    def as_stored(self) -> Self:
        """The same samples, not mirrored and not kept in memory, read in this process."""
        return self.model_copy(update={"workers": 0, "cache_bytes": 0, "horizontal_flip": False})


READING = {*DataSettings.model_fields} - {"kind"}
"""Settings of how samples are read, whatever the source."""


_OPENED: dict[str, ShardFolder] = {}
"""By working directory and settings."""


class ShardsData(DataSettings):
    """Shards that were prepared before, in a folder or below a URL (``http(s)://``, ``s3://``, ``gs://``, ``hf://``).

    Args:
        folder: of the shards.
        vae: hub id or folder of the autoencoder that latents must have been made with; None takes any. A folder's
            weights, scale and shift are compared with those that made the latents, a hub id by its name.
        cache: where shards of a URL are kept.
        cache_limit: how many bytes of them; None for all.
    """

    kind: Literal["shards"] = "shards"
    folder: PathOrUrl
    vae: str | None = None
    cache: Path = Path("data/cache")
    cache_limit: int | None = Field(default=None, ge=0)

    def open_folder(self) -> ShardFolder:
        """The folder, which must exist, with latents of the right autoencoder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if latents were made with another autoencoder, naming both.
        """
        shards = ShardFolder(self.folder, cache=self.cache, cache_limit=self.cache_limit)
        latents = shards.manifest.latents
        if self.vae is not None and latents is not None and Path(self.vae).is_dir():
            load_autoencoder(self.vae, expect=latents)
        elif self.vae is not None and (latents is None or latents.vae != self.vae):
            held = f"latents of {latents.vae!r}" if latents else "no latents"
            raise ValueError(
                f"{self.folder} holds {held}, data.vae says {self.vae!r}: prepare them with that one, or give the "
                "folder of the one that made them as data.vae"
            )
        return shards
