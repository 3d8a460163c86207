"""How fast stock webdataset shards are decoded: this library beside webdataset's own loader, in turn in one run.

    python benchmarks/webdataset_loader.py
    python benchmarks/webdataset_loader.py --urls 'imagenet/train-{000000..000003}.tar' --size 256 --rounds 9

One process on one thread, the same shards, the same resizing, uint8 batches from both.
Without ``--urls`` shards of smoothed noise in the size of a photograph are written by webdataset's ShardWriter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import print_rows, seconds_in_turn, write_result
from shortcutflow.data.images import encode_image, to_square
from shortcutflow.data.stream import ShardStream
from shortcutflow.data.webdataset import WebdatasetData

BATCH = 32


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", help="shards with jpg and cls members; braces stand for several")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=512, help="to write without --urls")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        urls = options.urls or made_shards(Path(folder) / "shards", options.samples)
        rows = compare(urls, Path(folder) / "cache", options.size, options.rounds)
    print_rows(rows)
    if options.write:
        config = {"size": options.size, "rounds": options.rounds, "images": str(bool(options.urls))}
        print(write_result("webdataset_loader", torch.device("cpu"), config, rows))


def compare(urls: str, cache: Path, size: int, rounds: int) -> list[dict[str, Any]]:
    """Images a second of each loader (medians), and ours divided by webdataset's, round by round."""
    data = WebdatasetData(urls=urls, size=size, workers=0, cache_bytes=0, cache=cache)
    stream = ShardStream(data.opened(), batch_size=BATCH, seed=0, workers=0, cache_bytes=0)
    count = stream.manifest.samples // BATCH * BATCH
    runs = {
        "webdataset, decode('pil')": partial(with_webdataset, urls, size, count),
        "shortcutflow, bytes for a GPU": partial(with_stream, stream, count),
        "shortcutflow, floats on the CPU": partial(with_floats, stream, count),
    }
    seconds = seconds_in_turn(runs, rounds, torch.device("cpu"), warm_up=1)
    theirs = seconds["webdataset, decode('pil')"]
    rows = []
    for name, taken in seconds.items():
        ratio = statistics.median(other / own for own, other in zip(taken, theirs, strict=True))
        rows.append({"name": name, "images_per_second": count / statistics.median(taken), "of_webdataset": ratio})
    return rows


def with_webdataset(urls: str, size: int, count: int) -> None:
    """One epoch in webdataset's own way."""
    import webdataset as wds

    def prepared(sample: tuple[Any, int]) -> tuple[np.ndarray, int]:
        return np.asarray(to_square(sample[0].convert("RGB"), size, "released")), sample[1]

    dataset = (
        wds.WebDataset(urls, shardshuffle=100, seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map(prepared)
        .batched(BATCH, partial=False)
    )
    seen = sum(len(torch.from_numpy(images)) for images, _ in dataset)
    assert seen == count, f"{seen} images, {count} are due"


def with_stream(stream: ShardStream, count: int) -> None:
    """One epoch, as the stream's worker processes read it."""
    for position in range(0, count, BATCH):
        stream.batches[position]


def with_floats(stream: ShardStream, count: int) -> None:
    """One epoch as training on a CPU gets it."""
    for _ in range(count // BATCH):
        next(stream)


def made_shards(folder: Path, samples: int) -> str:
    """Shards in the layout of imagenet-wds; gives their URL."""
    import webdataset as wds
    from PIL import Image

    rng, folder_pattern = np.random.default_rng(0), str(folder / "train-%06d.tar")
    folder.mkdir()
    with wds.ShardWriter(folder_pattern, maxcount=-(-samples // 4), verbose=0) as writer:
        for i in range(samples):
            coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            photograph = encode_image(coarse.resize((500, 375), Image.Resampling.BICUBIC), "jpg", 92)
            writer.write({"__key__": f"{i:08d}", "jpg": photograph, "cls": i % 10})
    return f"{folder}/train-{{000000..000003}}.tar"


if __name__ == "__main__":
    main()
