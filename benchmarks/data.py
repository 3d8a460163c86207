"""How fast data is prepared and streamed: ratios to what the bare libraries need for the same bytes, in one run.

    python benchmarks/data.py                     # all rows; minutes on a quiet core
    python benchmarks/data.py --only decode       # or latents, small, prepare, resume
    python benchmarks/data.py --images imagenet_sample.zip --write

Everything runs in one process on one thread, the contestants in turn. Photographs come from ``--images`` (any source
that ``shortcutflow prepare`` takes), or are made here: noise smoothed to the size of a photograph's JPEG.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import print_rows, put_into_page, seconds_in_turn, write_result
from shortcutflow.data.images import encode_image, to_square
from shortcutflow.data.manifest import LatentsInfo
from shortcutflow.data.prepare import prepare
from shortcutflow.data.shard_folder import ShardFolder
from shortcutflow.data.shards import Sample, shard_name, write_shards
from shortcutflow.data.sources import open_source
from shortcutflow.data.stream import ShardStream

LATENT = (4, 32, 32)
IMAGENET = 1_281_167
START, END = "<!-- data table: benchmarks/data.py writes it -->", "<!-- end of data table -->"
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {"decode": decode, "small": small, "latents": latents, "prepare": preparation, "resume": resume}
    parser.add_argument("--only", choices=groups, action="append", help="one group; may be repeated")
    parser.add_argument("--images", type=Path, help="raw photographs: a folder, zip, ...")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples to use; below 1 for a try")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results and the table of docs/data.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        photographs = options.images or made_photographs(Path(name) / "raw", max(4, int(64 * options.scale)))
        for group in options.only or groups:
            found = groups[group](Path(name), photographs, options)
            print(group, flush=True)
            print_rows(found)
            rows += [{"group": group} | row for row in found]
    if options.write:
        config = {"rounds": options.rounds, "scale": options.scale, "images": str(bool(options.images))}
        print(write_result("data", torch.device("cpu"), config, rows))
        put_into_page(START, _table(rows), END, page="docs/data.md")


def decode(folder: Path, photographs: Path, options: argparse.Namespace) -> list[Row]:
    """256x256 JPEGs: the stream against Pillow decoding the same bytes, and other loaders."""
    shards = folder / "jpeg"
    manifest = prepare(photographs, shards, size=256, format="jpg", workers=0, progress=False)
    reader = ShardFolder(shards)
    contents = [reader.stored(0, number) for number in range(manifest.shards[0].samples)]
    files = _as_image_folder(contents, "jpg", folder / "jpeg_files")
    return _images_in_turn(shards, contents, files, manifest.shards[0].samples, options.rounds)


def small(folder: Path, photographs: Path, options: argparse.Namespace) -> list[Row]:
    """32x32 PNGs, decoded at each visit and kept in memory."""
    rng, count = np.random.default_rng(0), max(64, int(5000 * options.scale))
    raw = folder / "small_raw"
    pictures = [encode_image(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8), "png", 95) for _ in range(count)]
    files = _as_image_folder(pictures, "png", raw)
    shards = folder / "small"
    prepare(raw, shards, size=32, crop="none", workers=0, progress=False)
    rows = _images_in_turn(shards, pictures, files, count, options.rounds)
    cached = ShardStream(shards, batch_size=count, seed=0, workers=0)
    next(cached)
    seconds = seconds_in_turn({"stream, kept in memory": partial(_take, cached, 1)}, options.rounds, _CPU)
    return [*rows, *_rates(seconds, count)]


def latents(folder: Path, photographs: Path, options: argparse.Namespace) -> list[Row]:
    """Moments of 32x32x4 latents and their mirror images: the stream against tarfile reading the same bytes."""
    count = max(128, int(4096 * options.scale))
    shards = _made_latents(folder / "latents", count, count, LATENT)
    stream = ShardStream(shards, batch_size=256, seed=0, horizontal_flip=True, cache_bytes=0, workers=0)
    reader = ShardFolder(shards)
    runs = {
        "tarfile": partial(_read_tar, shards / shard_name(0)),
        "stored moments": partial(_read_stored, reader, count),
        "stream, posteriors drawn": partial(_take, stream, count // 256),
    }
    return _rates(seconds_in_turn(runs, options.rounds, _CPU), count, against="tarfile")


def preparation(folder: Path, photographs: Path, options: argparse.Namespace) -> list[Row]:
    """Photographs to 256x256 JPEG shards in one process, against Pillow decoding, resizing and encoding them."""
    from PIL import Image

    source = open_source(photographs)
    count, fresh = len(source.items), itertools.count()

    def with_pillow() -> None:
        for item in source.items:
            with Image.open(io.BytesIO(source.reader.read(item))) as image:
                square = to_square(image.convert("RGB"), 256, "released")
            square.save(io.BytesIO(), "jpeg", quality=95, subsampling=0)

    def with_prepare() -> None:
        target = folder / f"prepared_{next(fresh)}"
        prepare(photographs, target, size=256, format="jpg", workers=0, progress=False)

    runs = {"Pillow": with_pillow, "shortcutflow prepare": with_prepare}
    return _rates(seconds_in_turn(runs, max(3, options.rounds // 2), _CPU, warm_up=1), count, against="Pillow")


def resume(folder: Path, photographs: Path, options: argparse.Namespace) -> list[Row]:
    """From opening a data set of ImageNet's length to the batch at sample 1,000,000."""
    count = max(20_000, int(IMAGENET * options.scale))
    shards = _made_latents(folder / "long", count, 4096, (1, 2, 2))

    def first_batch() -> None:
        stream = ShardStream(shards, batch_size=256, seed=0, cache_bytes=0, workers=0)
        stream.load_state_dict({"samples_seen": int(count * 0.78) // 256 * 256})
        next(stream)

    seconds = seconds_in_turn({"first batch": first_batch}, 3, _CPU, warm_up=0)["first batch"]
    return [{"name": f"resume at sample {int(count * 0.78):,} of {count:,}", "seconds": statistics.median(seconds)}]


_CPU = torch.device("cpu")


def _take(batches: Iterable[Any], count: int | None = None) -> None:
    """Take so many batches; None: all."""
    for _ in itertools.islice(batches, count):
        pass


def _take_bytes(stream: ShardStream, positions: Iterable[int]) -> None:
    """What the stream's worker processes do: batches as they travel to the device."""
    for position in positions:
        stream.batches[position]


def _read_stored(reader: ShardFolder, count: int) -> None:
    for number in range(count):
        reader.stored(0, number)


def _images_in_turn(shards: Path, contents: list[bytes], files: Path, count: int, rounds: int) -> list[Row]:
    from PIL import Image

    batch = math.gcd(count, 25)
    stream = ShardStream(shards, batch_size=batch, seed=0, cache_bytes=0, workers=0)

    def with_pillow() -> None:
        for content in contents:
            np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    runs: dict[str, Callable[[], None]] = {
        "Pillow": with_pillow,
        "stream, bytes for a GPU": partial(_take_bytes, stream, range(0, count, batch)),
        "stream, floats on the CPU": partial(_take, stream, count // batch),
    }
    runs |= _others(files)
    return _rates(seconds_in_turn(runs, rounds, _CPU, warm_up=1), count, against="Pillow")


def _others(files: Path) -> dict[str, Callable[[], None]]:
    """torchvision's and Hugging Face's loaders over the same files, where they are installed."""
    runs: dict[str, Callable[[], None]] = {}
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        folder = ImageFolder(str(files), transforms.PILToTensor())
        runs["torchvision ImageFolder, DataLoader"] = partial(
            _take, torch.utils.data.DataLoader(folder, batch_size=64, shuffle=True)
        )
    except (ImportError, RuntimeError) as error:
        print(f"without torchvision: {error}")
    try:
        from datasets import load_dataset

        streamed = load_dataset("imagefolder", data_dir=str(files), split="train", streaming=True)
        runs["Hugging Face datasets, streaming"] = partial(
            _take, torch.utils.data.DataLoader(streamed, batch_size=64, collate_fn=_stack)
        )
    except ImportError as error:
        print(f"without Hugging Face datasets: {error}")
    return runs


def _stack(samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(sample["image"].convert("RGB")) for sample in samples]))


def _rates(seconds: dict[str, list[float]], count: int, against: str | None = None) -> list[Row]:
    """Samples a second (medians), and the ratio to one of them, round by round."""
    rows = []
    for name, taken in seconds.items():
        row: Row = {"name": name, "per_second": count / statistics.median(taken)}
        if against is not None and name != against:
            ratios = [theirs / ours for ours, theirs in zip(taken, seconds[against], strict=True)]
            row[f"of_{against}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def _read_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            file.read()


def _as_image_folder(contents: list[bytes], extension: str, folder: Path) -> Path:
    for i, content in enumerate(contents):
        path = folder / f"class{i % 2}" / f"{i:05d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def made_photographs(folder: Path, count: int) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        pictures.append(encode_image(coarse.resize((500, 375), Image.Resampling.BICUBIC), "jpg", 92))
    return _as_image_folder(pictures, "jpg", folder)


def _made_latents(folder: Path, count: int, samples_per_shard: int, shape: tuple[int, int, int]) -> Path:
    """Shards of random moments of latents of this shape and their mirror images."""
    rng, (channels, height, width) = np.random.default_rng(0), shape

    def samples() -> Iterator[Sample]:
        for i in range(count):
            moments = rng.standard_normal((2, 2 * channels, height, width), dtype=np.float32)
            yield Sample(moments.astype(np.float16), None, f"sample{i}")

    info = LatentsInfo(vae="none", sha256="0" * 64, scaling_factor=0.18215, mirrored=True)
    write_shards(
        samples(), folder, samples_per_shard=samples_per_shard, latents=info, preprocessing="random numbers"
    )  # fmt: skip
    return folder


def _table(rows: list[Row]) -> str:
    lines = ["| what | how | samples a second | ratio |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        ratio = next((f"{value:.2f} of {key[3:]}" for key, value in row.items() if key.startswith("of_")), "")
        rate = f"{row['per_second']:,.0f}" if "per_second" in row else f"{1000 * row['seconds']:.0f} ms"
        lines.append(f"| {row['group']} | {row['name']} | {rate} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
