"""``manifest.json``: what a folder of shards holds, so that a missing or cut-off shard is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

MANIFEST = "manifest.json"


class ShardEntry(BaseModel):
    """One shard: its file name in the folder, samples, bytes and SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        # A name from a file must not reach outside its folder, nor look like one of webdataset's "pipe:" commands.
        if Path(value).name != value or ":" in value or value.startswith("."):
            raise ValueError(f"a shard must be a plain file name, got {value!r}")
        return value


class Manifest(BaseModel):
    """What the shards of a folder hold.

    Attributes:
        shape: of one sample, (channels, height, width) or (length, channels).
        values: "uint8" for images of 256 levels, stored as PNG; "float32" for anything else, stored as it is.
        num_classes: labels are 0 ... num_classes - 1; None for no labels.
        condition_shape: shape of the float32 tensor each sample is conditioned on; None for none.
        class_names: their names, in order.
        preprocessing: what was done to the raw data, in words.
        shards: in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    values: Literal["uint8", "float32"] = "uint8"
    num_classes: int | None
    condition_shape: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    preprocessing: str
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """How many samples all shards hold."""
        return sum(shard.samples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it into the folder; last, after the shards."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it and check that every shard is there in its full size.

        Raises:
            FileNotFoundError: without a manifest, or with a shard missing.
            ValueError: if the manifest does not parse or a shard has another size.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST}: it is not a folder of prepared shards")
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} is not a valid manifest: {error.errors()[0]['msg']}") from error
        for shard in manifest.shards:
            file = folder / shard.name
            if not file.is_file():
                raise FileNotFoundError(f"shard {file} is missing, {path} lists it")
            if (size := file.stat().st_size) != shard.bytes:
                raise ValueError(f"shard {file} has {size} bytes, {path} says {shard.bytes}: it is damaged or cut off")
        return manifest
