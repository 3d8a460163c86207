"""What the skeleton costs: DiT beside a bare stack of attention blocks of the same size.

    python benchmarks/skeleton.py            # DiT-S/2 at 32x32x4 (256 tokens), forward and backward
    python benchmarks/skeleton.py --write

The bare stack has no condition: projection, blocks of norm, scaled_dot_product_attention, norm, MLP (plain
LayerNorm, plain residuals), projection. Both run in turn; compared are the fastest and the median of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

import backbones
from benchmarks.record import device_name, seconds_in_turn, write_result


class BareBlock(nn.Module):
    """A pre-norm transformer block and nothing more."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        heads = self.qkv(self.norm_attention(x)).view(b, n, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, width))
        return x + self.mlp(self.norm_mlp(x))


def once(net: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> None:
    """One forward pass, with gradients also one backward pass."""
    with torch.set_grad_enabled(backward):
        out = net(*inputs)
        if backward:
            out.square().mean().backward()
            net.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dit_s_2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results/")
    args = parser.parse_args()
    device = torch.device(args.device)
    dit: Any = backbones.create(args.backbone, shape=(4, 32, 32), num_classes=1000).to(device)
    values, heads = dit.patch_embedding.in_features, dit.blocks[0].mixer.heads
    blocks = [BareBlock(dit.width, heads) for _ in dit.blocks]
    bare = nn.Sequential(nn.Linear(values, dit.width), *blocks, nn.Linear(dit.width, values)).to(device)
    x = torch.randn(args.batch, 4, 32, 32, device=device)
    t = torch.full((args.batch,), 0.5, device=device)
    given = {"bare stack": (bare, (torch.randn(args.batch, 1024 // dit.patch**2, values, device=device),)),
             args.backbone: (dit, (x, t, t, torch.zeros(args.batch, dtype=torch.int64, device=device)))}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for what, backward in (("forward", False), ("forward and backward", True)):
        runs = {name: partial(once, net, inputs, backward) for name, (net, inputs) in given.items()}
        seconds = seconds_in_turn(runs, args.rounds, device)
        base = seconds["bare stack"]
        for name, times in seconds.items():
            rows.append({
                "what": what, "name": name, "ms_min": 1000 * min(times), "ms_median": 1000 * statistics.median(times),
                "min_over_bare": min(times) / min(base),
                "median_over_bare": statistics.median(times) / statistics.median(base),
            })  # fmt: skip
    print(f"{args.backbone}, batch {args.batch}, on {device_name(device)}, torch {torch.__version__}")
    for r in rows:
        print(f"  {r['what']}, {r['name']}: fastest {r['ms_min']:.1f} ms ({r['min_over_bare']:.3f} of the bare stack), "
              f"median {r['ms_median']:.1f} ms ({r['median_over_bare']:.3f})")  # fmt: skip
    if args.write:
        config = {"backbone": args.backbone, "batch": args.batch, "rounds": args.rounds}
        print(write_result("skeleton", device, config, rows))


if __name__ == "__main__":
    main()
