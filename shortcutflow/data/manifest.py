"""``manifest.json``: what a folder of shards holds, so that a missing or cut-off shard is noticed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from shortcutflow.data.remote import is_url, read_url
from shortcutflow.io.atomic import write_whole
from shortcutflow.io.json import wrong_fields

MANIFEST = "manifest.json"
VERSION = 2
LARGEST_MANIFEST = 256 * 2**20
MOST_SAMPLES = 2**22
"""In one shard. The order of an epoch is computed from a manifest's numbers, which therefore must be bounded."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class ShardEntry(BaseModel):
    """One shard: its file name in the folder, samples, bytes and SHA-256, and the SHA-256 of its index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    samples: int = Field(ge=1, le=MOST_SAMPLES)
    bytes: int = Field(ge=1, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        # A name from a file must not reach outside its folder, nor mean anything to a shell.
        if not _PLAIN_NAME.fullmatch(value) or not value.endswith(".tar"):
            raise ValueError(f"a shard must be a plain file name ending in .tar, got {value!r}")
        return value

    @property
    def index_name(self) -> str:
        """The file beside it that says where in it each sample lies."""
        return self.name.removesuffix(".tar") + ".index"


class LatentsInfo(BaseModel):
    """How latents were made.

    Attributes:
        vae: the autoencoder's hub id, or its folder's absolute path.
        sha256: of its weights.
        scaling_factor, shift_factor: a latent is (posterior sample - shift_factor) * scaling_factor.
        mirrored: whether the moments of the mirror image are there too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vae: str
    sha256: str
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)
    shift_factor: float = Field(default=0.0, allow_inf_nan=False)
    mirrored: bool

    def __str__(self) -> str:
        return (
            f"latents of {self.vae} (SHA-256 {self.sha256[:12]}, scale {self.scaling_factor}, shift "
            f"{self.shift_factor})"
        )

    def differing(self, other: object) -> list[str]:
        """Names of what differs from other latents, or from an autoencoder: scale, shift or weights."""
        names = ("scaling_factor", "shift_factor", "sha256")
        return [name for name in names if getattr(self, name) != getattr(other, name, None)]


class Manifest(BaseModel):
    """What the shards of a folder hold.

    Attributes:
        version: of this format.
        shape: of one sample as training sees it: (channels, height, width), (length, channels), or of any number of
            dimensions.
        values: "uint8" for images, "float32" for anything else stored as it is, "moments" for float16 means and
            log-variances (2 channels, height, width) of latents.
        format: how a sample's values are stored.
        latents: of moments: how they were made.
        num_classes: labels are 0 ... num_classes - 1; None for no labels.
        condition_shape: shape of the float32 tensor each sample is conditioned on; None for none.
        class_names: their names, in order.
        preprocessing: what was done to the raw data, in words.
        settings: the same as the options of the command that did it.
        shards: in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    shape: tuple[int, ...] = Field(min_length=1)
    values: Literal["uint8", "float32", "moments"] = "uint8"
    format: Literal["png", "jpg", "webp", "npy"] = "png"
    latents: LatentsInfo | None = None
    num_classes: int | None = Field(default=None, ge=1)
    condition_shape: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    preprocessing: str
    settings: dict[str, JsonValue] = {}
    shards: tuple[ShardEntry, ...] = Field(min_length=1)

    @field_validator("version")
    @classmethod
    def _this_version(cls, value: int) -> int:
        if value != VERSION:
            raise ValueError(f"it is of version {value}, this library reads version {VERSION}: prepare the data again")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Manifest:
        if (self.values == "uint8") == (self.format == "npy"):
            raise ValueError(f"values {self.values!r} are not stored as {self.format!r}")
        if (self.values == "moments") != (self.latents is not None):
            raise ValueError("moments, and nothing else, come with a record of their autoencoder ('latents')")
        if min(self.shape) < 1 or min(self.condition_shape or (1,)) < 1:
            raise ValueError(f"shapes must be positive, got {self.shape} and {self.condition_shape}")
        if self.values == "uint8" and (len(self.shape) != 3 or self.shape[0] not in (1, 3)):
            raise ValueError(f"images have 1 or 3 channels, height and width, got {self.shape}")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same name")
        return self

    @property
    def samples(self) -> int:
        """How many samples all shards hold."""
        return sum(shard.samples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it into the folder, whole or not at all; last, after the shards."""
        write_whole(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def parse(cls, content: bytes, where: str) -> Manifest:
        """From the content of a ``manifest.json``; raises ValueError, naming ``where`` it came from, if it is none."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise ValueError(f"{where} is not a valid manifest: {wrong_fields(error, most=1)}") from error

    @classmethod
    def read(cls, folder: Path | str) -> Manifest:
        """Read the one of a folder or URL.

        Raises:
            FileNotFoundError: without a manifest.
            ReadError: if it cannot be fetched.
            ValueError: if the manifest does not parse.
        """
        where = f"{folder}/{MANIFEST}"
        if is_url(folder):
            return cls.parse(read_url(where, LARGEST_MANIFEST), where)
        path = Path(where)
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST}: it is not a folder of prepared shards, "
                f"which `shortcutflow prepare SOURCE {folder} --size ...` makes"
            )
        if path.stat().st_size > LARGEST_MANIFEST:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {LARGEST_MANIFEST} are read")
        return cls.parse(path.read_bytes(), where)
