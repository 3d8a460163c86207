"""Raw pictures to shards of latents: ``shortcutflow prepare --latents``.

What is kept of a picture, and of its mirror image, are the moments that the autoencoder gives: mean and log-variance in
float16, 32 KiB together at 256 pixels. Training draws a new latent from them at every visit, and never encodes.

One process encodes everything; of several (``torchrun``) each takes its share, on a device of its own. They need no
process group: they meet in the folder. Pictures are decoded ahead of the encoder, in worker processes.

Numbers are float32 until they are stored, without autocast; whether a GPU's convolutions round to TF32 is left to
torch's own switch. The same device, versions and number of threads give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from shortcutflow.data.autoencoder import DEFAULT_VAE, Autoencoder, load_autoencoder
from shortcutflow.data.images import Crop
from shortcutflow.data.latent_encoder import LatentOptions, decoded, packs, refuse, rows
from shortcutflow.data.manifest import LatentsInfo, Manifest
from shortcutflow.data.preparation import (
    PREPARATION,
    Preparation,
    begin,
    check_place,
    complete,
    cut,
    entries_of,
    finish,
    finished_shard,
    only_one,
    shuffled_order,
    skipped_of,
    versions_of,
)
from shortcutflow.data.prepare import CROPS_IN_WORDS
from shortcutflow.data.ranks import wait_for
from shortcutflow.data.shards import shard_name, write_shard
from shortcutflow.data.sources import open_source
from shortcutflow.data.sources.readers import RawItem, RawSource
from shortcutflow.data.stream import workers_to_spare
from shortcutflow.distributed import Rank


def prepare_latents(
    source: Path,
    folder: Path,
    *,
    size: int = 256,
    vae: str | Path = DEFAULT_VAE,
    crop: Crop = "released",
    labels: bool | str = True,
    seed: int = 0,
    samples_per_shard: int = 4096,
    samples_per_member: int = 64,
    batch_size: int = 32,
    mirror: bool = True,
    device: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Manifest:
    """Encode the pictures of a source into shards of moments that training streams latents from.

    The same call continues after any stop, and whole shards are kept. Under ``torchrun`` every rank makes this call;
    rank 0 waits for the others' shards and completes the folder, and all return then.

    Args:
        source: raw pictures, see :mod:`shortcutflow.data.sources`, or a folder of image shards.
        folder: for the shards; new, or of an earlier call with the same options.
        size: side of the square pictures, in pixels.
        vae: hub id or folder of the autoencoder, see :func:`~shortcutflow.data.autoencoder.load_autoencoder`.
        crop: see :func:`~shortcutflow.data.images.to_square`.
        labels: which, see :data:`~shortcutflow.data.sources.labels.LabelChoice`; False for none.
        seed: of the order.
        samples_per_shard: items each shard is made of.
        samples_per_member: samples that share a member of a shard.
        batch_size: pictures encoded at once; each mirror image is encoded after its picture.
        mirror: encode mirror images too, which training with ``horizontal_flip`` needs.
        device: to encode on; None takes a GPU if there is one, and every rank of a machine one of its own.
        workers: processes that decode pictures; 0 decodes in this one, None takes the cores to spare.
        strict: raise at the first item that gives no sample, instead of listing it in ``skipped.txt``.
        progress: show a progress bar (rank 0: of its own share), on standard error.

    Raises:
        FileNotFoundError, ValueError: for a source, autoencoder, options or folder that do not fit, saying what does;
            for moments outside the range of float16, naming the picture.
        TimeoutError: if another rank's shards do not come, naming it.
        OSError: if reading, writing or downloading fails; then too the same call continues.
    """
    rank = Rank.from_environment()
    check_place(folder, source)
    autoencoder = load_autoencoder(vae, device=rank.device(device))
    autoencoder.latent_shape(size)
    options = LatentOptions(
        size=size, crop=crop, labels=labels, seed=seed, samples_per_shard=samples_per_shard,
        samples_per_member=samples_per_member, batch_size=batch_size, mirror=mirror,
        vae_sha256=autoencoder.sha256,
    )  # fmt: skip
    if rank.number:
        # Before that, rank 0 may be in the middle of writing it.
        wait_for(folder, lambda: "" if (folder / PREPARATION).is_file() else f"{PREPARATION}, of rank 0, is")
    raw = open_source(source, labels=options.labels)
    if strict:
        refuse(raw.skipped)
    fingerprint = raw.fingerprint()
    if (done := complete(folder, options.model_dump(), fingerprint, strict=strict)) is not None:
        return done
    job = _Job(raw, folder, options, autoencoder, rank, workers, strict, progress)
    if rank.number:
        return _help(job)
    with only_one(folder, say=progress):
        if (done := complete(folder, options.model_dump(), fingerprint, strict=strict)) is not None:
            return done
        return _lead(job, source)


class _Job(NamedTuple):
    """One call of :func:`prepare_latents`."""

    source: RawSource
    folder: Path
    options: LatentOptions
    autoencoder: Autoencoder
    rank: Rank
    workers: int | None
    strict: bool
    progress: bool

    def preparation(self) -> Preparation:
        """The record of what is made."""
        versions = versions_of("shortcutflow", "pillow", "torch", "diffusers")
        return Preparation(options=self.options.model_dump(), source=self.source.fingerprint(), versions=versions)

    def plan(self) -> list[list[RawItem]]:
        """The items of each shard."""
        order = shuffled_order(self.source, self.options.seed)
        return [[self.source.items[i] for i in part] for part in cut(order, self.options.samples_per_shard)]


def _lead(job: _Job, path: Path) -> Manifest:
    """Rank 0: begin, encode its share, wait for the others' and complete the folder."""
    folder, options, preparation, plan = job.folder, job.options, job.preparation(), job.plan()
    if job.progress:
        job.source.print_notes()
    begin(folder, preparation)
    _write_share(job, plan)
    wait_for(folder, _late_shards(folder, len(plan), job.rank.world_size))
    shards = [shard for number in range(len(plan)) if (shard := finished_shard(folder, number)) is not None]
    skipped = skipped_of(job.source.skipped, shards)
    names = job.source.class_names if options.labels else ()
    autoencoder = job.autoencoder
    manifest = Manifest(
        shape=autoencoder.latent_shape(options.size), values="moments", format="npy",
        latents=LatentsInfo(
            vae=autoencoder.name, sha256=autoencoder.sha256, scaling_factor=autoencoder.scaling_factor,
            shift_factor=autoencoder.shift_factor, mirrored=options.mirror,
        ),
        num_classes=len(names) or None, class_names=names,
        preprocessing=(
            f"{CROPS_IN_WORDS[options.crop]}; {options.size}x{options.size} RGB; moments by {autoencoder.name}"
        ),
        settings=options.model_dump() | {"source": preparation.source, "skipped": len(skipped)} | preparation.versions,
        shards=entries_of(path, shards, skipped),
    )  # fmt: skip
    return finish(folder, manifest, skipped)


def _help(job: _Job) -> Manifest:
    """Another rank: encode its share of what rank 0 has begun, and wait until the folder is complete."""
    folder, done = job.folder, list[Manifest]()
    if Preparation.read(folder) != job.preparation():
        raise ValueError(f"{folder} was begun with other options, versions or another source; rank 0 says which differ")
    _write_share(job, job.plan())

    def missing() -> str:
        done.extend(manifest for manifest in [complete(folder, job.options.model_dump())] if manifest is not None)
        return "" if done else "the manifest, of rank 0, is"

    wait_for(folder, missing)
    return done[0]


def _write_share(job: _Job, plan: list[list[RawItem]]) -> None:
    """Encode those of this rank's shards that are not there yet."""
    share = range(job.rank.number, len(plan), job.rank.world_size)
    missing = []
    for number in share:
        if (shard := finished_shard(job.folder, number)) is None:
            missing.append(number)
        elif job.strict:
            refuse(shard.skipped)
    size = job.options.batch_size
    batches = [plan[number][i : i + size] for number in missing for i in range(0, len(plan[number]), size)]
    workers = workers_to_spare() if job.workers is None else job.workers
    pictures = decoded(job.source, batches, job.options, min(workers, len(batches)))
    total, to_do = (sum(len(plan[number]) for number in numbers) for numbers in (share, missing))
    quiet = not job.progress or job.rank.number > 0
    with tqdm(total=total, initial=total - to_do, desc="latents", unit="image", disable=quiet, mininterval=1) as bar:
        for number in missing:
            mine = islice(pictures, -(-len(plan[number]) // size))
            encoded = rows(mine, job.autoencoder, job.options, job.strict, bar.update)
            write_shard(job.folder / shard_name(number), packs(encoded, number, job.options.samples_per_member))


def _late_shards(folder: Path, shards: int, world_size: int) -> Callable[[], str]:
    """Says which shards are not written yet, and which ranks owe them."""
    late = set(range(shards))

    def missing() -> str:
        late.difference_update([number for number in late if finished_shard(folder, number) is not None])
        if not late:
            return ""
        ranks = sorted({number % world_size for number in late})
        return f"{len(late)} of {shards} shards, of rank {', '.join(map(str, ranks))}, are"

    return missing
