"""How long sampling takes, beside bare calls of the network that do the same number of steps.

    python benchmarks/sampling.py                                   # DiT-S/2, batch 1 and 8, eager: a minute
    python benchmarks/sampling.py --device cuda --backbone dit_b_2 --batch 1 256 --compile --write      # bfloat16

The two run in turn. ``share_of_bare`` is the part of the time that the network itself needs: 1 if `sample` were free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

import backbones
import shortcutflow as sf
from benchmarks.record import device_name, print_rows, seconds_in_turn, write_result
from shortcutflow.train.parallel import compile_options
from shortcutflow.types import Network

LATENT, CLASSES = (4, 32, 32), 1000


def rows_of(net: Network, batch: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of ``sample`` and of as many bare calls; medians of all rounds."""
    device = torch.device(args.device)
    noise = torch.randn(batch, *LATENT, device=device)
    y = torch.arange(batch, device=device) % CLASSES
    t, d = (torch.full((batch,), value, device=device) for value in (0.5, 1 / steps))

    def sampled() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            sf.sample(net, noise, y, steps=steps)

    @torch.no_grad()
    def bare() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for _ in range(steps):
                net(noise, t, d, y)

    seconds = seconds_in_turn({"sample": sampled, "bare": bare}, args.rounds, device)
    ours, theirs = (statistics.median(seconds[name]) for name in ("sample", "bare"))
    return {
        "name": f"batch {batch}, {steps} steps", "batch": batch, "steps": steps, "ms": 1000 * ours,
        "ms_bare": 1000 * theirs, "share_of_bare": theirs / ours, "images_per_second": batch / ours,
    }  # fmt: skip


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and number of steps."""
    device = torch.device(args.device)
    net: Any = backbones.create(args.backbone, shape=LATENT, num_classes=CLASSES, **args.options).to(device).eval()
    if args.compile:
        net = torch.compile(net, dynamic=False, **compile_options(device))
    return [rows_of(net, batch, steps, args) for batch in args.batch for steps in args.steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dit_s_2", help="name of the network")
    parser.add_argument("--options", type=json.loads, default={}, help="the network's options, as JSON")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda: in bfloat16")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results/")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = measure(args)
    print(f"{args.backbone} on {device_name(device)}, torch {torch.__version__}")
    print_rows(rows)
    if args.write:
        config = {key: value for key, value in vars(args).items() if key != "write"}
        print(write_result("sampling", device, config, rows))


if __name__ == "__main__":
    main()
