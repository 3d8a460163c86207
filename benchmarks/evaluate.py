"""What an evaluation costs: all of it for small images, and beside the extractor for large ones.

    python benchmarks/evaluate.py --write       # minutes on 2 cores

* *digits*: 50,000 samples of the digits recipe's network at one step, protocol pixels, Fréchet distance and all.
* *inception*: a few hundred such samples through torchvision's Inception v3 (random weights, 299 pixels, clean-fid's
  resize): how much of the time the extractor takes, and so how little the rest could save.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import device_name, print_rows, put_into_page, write_result
from recipes.digits import recipe
from shortcutflow.config import CURRENT
from shortcutflow.evaluation.distances.statistics import Statistics, save_statistics
from shortcutflow.evaluation.evaluate import evaluate
from shortcutflow.evaluation.features.extractors import NetworkExtractor
from shortcutflow.evaluation.features.protocols import EvaluationProtocol, open_protocol
from shortcutflow.evaluation.features.resize import clean_fid_resize
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.config import config_of_run
from shortcutflow.models.model import Model

SHOWN = ("sampling", "extraction", "distances")
"""Phases of their own in the table."""
PAGE = "docs/evaluation.md"
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000, help="of the digits")
    parser.add_argument("--inception-samples", type=int, default=300, help="through Inception; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=500, help="samples at once")
    parser.add_argument("--protocol", default="pixels", choices=["pixels", "digits"], help="of the digits")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results and the table of {PAGE}")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = [measured("digits", open_protocol(args.protocol, device=device), args.samples, args.batch, device)]
    if args.inception_samples:
        rows.append(measured("inception", inception(device), args.inception_samples, args.batch, device))
    print(f"one step of the digits recipe's network on {device_name(device)}, torch {torch.__version__}")
    print_rows(rows)
    if args.write:
        config = {key: value for key, value in vars(args).items() if key != "write"}
        print(write_result("evaluate", device, config, rows))
        start = f"<!-- evaluation table, {device.type}: benchmarks/evaluate.py writes it -->"
        put_into_page(start, table_of(rows), "<!-- end of evaluation table -->", page=PAGE)


def measured(name: str, protocol: EvaluationProtocol, samples: int, batch: int, device: torch.device) -> Row:
    """One evaluation from the loaded network to the report, against statistics that are there."""
    sampler = Sampler(untrained(device), batch_size=batch)
    width = protocol.extractor(np.zeros((2, *sampler.side, 3), np.uint8)).features.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        reference, out = Path(folder) / "reference.npz", Path(folder) / "report.json"
        save_statistics(reference, Statistics(np.zeros(width), np.eye(width)))
        sampler.samples(1, range(batch))  # the first call is slower
        start = time.perf_counter()
        report = evaluate(sampler, protocol, out, steps=(1,), samples=samples, reference=reference)
        seconds = time.perf_counter() - start
    assert report is not None
    phases = report["rows"][0]["seconds"]
    return {
        "name": name, "samples": samples, "seconds": seconds, "samples_per_second": samples / seconds,
        **{f"{phase}_percent": 100 * spent / seconds for phase, spent in phases.items()},
        "rest_percent": 100 * (1 - sum(phases[phase] for phase in SHOWN) / seconds),
    }  # fmt: skip


def untrained(device: torch.device) -> Model:
    """The network of the digits recipe; what weights it has changes no time."""
    config = recipe()
    described = config_of_run(config, config.data.describe(), weights=CURRENT, step=0)
    network = config.build_network().to(device).eval()
    return Model(network, described, CURRENT, Path("digits"), "digits", config.data)


def inception(device: torch.device) -> EvaluationProtocol:
    """An extractor of Inception's size."""
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False, aux_logits=False).to(device).eval()
    network.fc = torch.nn.Identity()

    def features(images: Tensor) -> Tensor:
        return network((images - 128) / 128)

    extractor = NetworkExtractor(features, clean_fid_resize(299), name="inception v3, random weights", device=device)
    return EvaluationProtocol("inception", "torchvision's Inception v3 with random weights", extractor)


def table_of(rows: list[Row]) -> str:
    """As Markdown."""
    lines = ["| | samples | seconds | sampling | extraction | distances | the rest |", "| --- |" + " ---: |" * 6]
    for row in rows:
        shares = " | ".join(f"{row[f'{phase}_percent']:.1f}%" for phase in (*SHOWN, "rest"))
        lines.append(f"| {row['name']} | {row['samples']:,} | {row['seconds']:.1f} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
