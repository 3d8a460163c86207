"""How long Mamba's mixer takes beside self-attention, and the selective scan alone.

    python benchmarks/scan.py                               # width 384 at 64, 256, 1024 and 4096 tokens
    python benchmarks/scan.py --tokens 256 --repeats 20 --write
    python benchmarks/scan.py --device cuda --bfloat16      # with mamba-ssm's kernels where they are

Milliseconds are of forward and backward together. All three take turns, so that what else the machine does meets all
alike; the ratios are of the minima.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from backbones.attention import Attention
from backbones.mamba_mixer import MambaMixer
from backbones.selective_scan import selective_scan
from benchmarks.record import device_name, print_rows, seconds_in_turn, write_result

STATE = 16


def mixer_run(mixer: nn.Module, x: Tensor, bfloat16: bool) -> Callable[[], None]:
    """Forward and backward of a mixer, to its input and parameters."""

    def run() -> None:
        mixer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            y = mixer(x)
        y.backward(torch.ones_like(y))

    return run


def scan_run(batch: int, tokens: int, inner: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the scan without D, z and softplus, to all five inputs, laid out as the mixer does."""
    u, delta = (torch.rand(batch, tokens, inner, device=device).mT.requires_grad_() for _ in range(2))
    A = -torch.arange(1.0, STATE + 1, device=device).repeat(inner, 1).requires_grad_()
    B, C = (torch.randn(batch, tokens, STATE, device=device).mT.requires_grad_() for _ in range(2))
    weights = torch.ones(batch, tokens, inner, device=device).mT

    def run() -> None:
        torch.autograd.grad(selective_scan(u, delta, A, B, C), (u, delta, A, B, C), weights)

    return run


def rows_of(tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Attention, mixer and scan at one length; the batch shrinks where the tokens together would be too many."""
    device = torch.device(args.device)
    batch = max(1, min(args.batch, args.most_tokens // tokens))
    x = torch.randn(batch, tokens, args.width, device=device, requires_grad=True)
    attention = Attention(args.width, args.heads).to(device)
    mamba = MambaMixer(args.width, STATE, kernels=args.kernels).to(device)
    runs = {
        "attention": mixer_run(attention, x, args.bfloat16),
        "mamba": mixer_run(mamba, x, args.bfloat16),
        "scan": scan_run(batch, tokens, 2 * args.width, device),
    }
    seconds = seconds_in_turn(runs, args.repeats, device, warm_up=1)
    times = {name: [1000 * each for each in of_run] for name, of_run in seconds.items()}
    return [
        {
            "name": name, "tokens": tokens, "batch": batch, "ms_min": min(t), "ms_median": statistics.median(t),
            "times_attention": min(t) / min(times["attention"]),
        }
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument(
        "--most-tokens", type=int, default=4096, help="of all samples; longer ones come in fewer samples"
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6, help="of the attention")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--kernels", default="auto", help="of the mixer")
    parser.add_argument("--bfloat16", action="store_true", help="autocast the mixers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results/")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"scan on {device_name(device)}, torch {torch.__version__}")
    rows = [row for tokens in args.tokens for row in rows_of(tokens, args)]
    print_rows(rows)
    if args.write:
        config = {k: v for k, v in vars(args).items() if k not in ("write", "device")} | {"state": STATE}
        print(write_result("scan", device, config, rows))


if __name__ == "__main__":
    main()
