"""What a training step costs, counted on any machine: nothing is run, no GPU is needed.

    python benchmarks/cost.py --write                         # the rows of docs/performance.md
    python benchmarks/cost.py dit_b_imagenet training.compile=false        # one recipe, with overrides
    python benchmarks/cost.py dit_xl_imagenet --ranks 64 training.compile=false training.gradient_checkpointing=true

The library's own step runs on fake tensors (benchmarks/counting.py): rank 0's share of the recipe's global batch, with
the fake process group in place of the other ranks. From the counts a roofline: each kernel takes as long as its
operations at the products' rate or its bytes at the memory's, whichever is longer, and they run one after the other.

What the compiler fuses depends on the device: here it fuses for a CPU, on a build of torch with CUDA and a device
(``--device cuda``) for that. Bytes are the
compiler's own estimate. The first steps, which compile, are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.counting import H100, Census, Counts, compiled_by
from benchmarks.record import RESULTS, print_rows, put_into_page, write_result
from shortcutflow.commands.recipes import load_recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.source import DataInfo
from shortcutflow.distributed import World
from shortcutflow.train import parallel, state
from shortcutflow.train.heartbeat import Heartbeat
from shortcutflow.train.metrics import RunningMeans
from shortcutflow.train.resume import Position
from shortcutflow.train.step import clip_gradients, forward_backward, step_if_finite
from shortcutflow.types import Batch

PAGE, START, END = (
    "docs/performance.md",
    "<!-- cost table: benchmarks/cost.py writes it -->",
    "<!-- end of cost table -->",
)
SHAPES = {"imagenet": ((4, 32, 32), 1000), "celebahq": ((4, 32, 32), None), "cifar10": ((3, 32, 32), None),
          "digits": ((1, 8, 8), 10)}  # fmt: skip
"""Of the recipes' data, which need not be there: shape and classes by a part of the recipe's name."""
EAGER = "training.compile=false"
ROWS: list[tuple[str, str, int, list[str]]] = [
    ("DiT-B/2", "dit_b_imagenet", 1, []),
    ("DiT-B/2, rounded residual", "dit_b_imagenet", 1, ["backbone.options.round_residual=true"]),
    ("DiT-B/2, eager", "dit_b_imagenet", 1, [EAGER]),
    ("DiT-B/2, eager, flow matching", "dit_b_imagenet", 1, [EAGER, "objective.kind=flow_matching"]),
    ("DiT-B/2, eager, DDP on 8", "dit_b_imagenet", 8, [EAGER]),
    ("DiT-XL/2, eager, FSDP on 8", "dit_xl_imagenet", 8, [EAGER]),
    ("DiT-XL/2, eager, FSDP on 8, checkpointing", "dit_xl_imagenet", 8,
     [EAGER, "training.gradient_checkpointing=true"]),
    ("U-Net, CIFAR-10, eager", "unet_cifar10", 1, [EAGER]),
    ("digits, eager, batch 64", "digits_paper", 1, []),
]  # fmt: skip
"""Name, recipe, ranks and overrides of each row of the page's table."""
Row = dict[str, Any]


def main() -> None:
    """Count, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="one recipe instead of all rows of the table")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the recipe")
    parser.add_argument("--ranks", type=int, default=1, help="that share the global batch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="whose kernels are counted")
    parser.add_argument("--rows", nargs="+", help="of the table: count these alone, and keep the others as they are")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results and the table of {PAGE}")
    args = parser.parse_intermixed_args()
    if args.recipe:
        config = with_overrides(load_recipe(args.recipe), args.overrides)
        print_rows([{"name": args.recipe} | row_of(count(config, ranks=args.ranks, device=args.device))])
        return
    counted = {}
    for name, recipe, ranks, overrides in ROWS:
        if args.rows is None or name in args.rows:
            config = with_overrides(load_recipe(recipe), overrides)
            counted[name] = {"name": name} | row_of(count(config, ranks=ranks, device=args.device))
            print_rows([counted[name]])
    if args.write:
        path = RESULTS / f"cost_{args.device}.json"
        kept = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
        rows = [(kept | counted)[name] for name, *_ in ROWS if name in kept | counted]
        print(write_result("cost", torch.device(args.device), {"rows": ROWS, "rates": vars(H100)}, rows))
        put_into_page(START, table_of(rows), END, page=PAGE)


def count(config: RunConfig, *, ranks: int = 1, device: str = "cpu", info: DataInfo | None = None) -> Counts:
    """Of a step of a run, after the first ones: rank 0's share.

    Args:
        config: the run; its teacher and the weights it starts from are left out, and a coupling's noise is given.
        ranks: that share the global batch.
        device: whose kernels are counted.
        info: shape and classes of the data; None: those of the recipe of this name.
    """
    config = config.model_copy(update={"start": None, "teacher": None, "coupling": None})
    info = info or DataInfo(*next(shape for part, shape in SHAPES.items() if part in config.name))
    census, position, heartbeat, means = Census(), Position(), mock.Mock(spec=Heartbeat), RunningMeans()
    rows = config.training.global_batch_size // ranks
    torch.compiler.reset()
    with (
        ranks_of(config, ranks, torch.device(device)) as world,
        standing_in(config, world, info),
        compiled_by(census),
        census,
    ):
        built = state.build_train_state(config, world)
        # The first makes the optimizer's state, and a compiled second one could still be compiled anew.
        for step in range(3 if config.training.compile else 2):
            labels = torch.zeros(rows, dtype=torch.int64) if info.num_classes is not None else None
            batch = Batch(torch.empty(rows, *info.shape), labels, ("",) * rows)
            census.begin()
            graphs_before = counters["stats"]["unique_graphs"]
            with census.calls():
                reports = forward_backward(config, built, world, batch, position, step, heartbeat)
            grad_norm = clip_gradients(built.optimizer, config.optimizer.max_grad_norm)
            step_if_finite(built.optimizer, world, reports, grad_norm, False)
            built.update_emas(step)
            for report in reports:
                means.add(report, grad_norm=grad_norm)
            built.optimizer.zero_grad(set_to_none=True)
            del reports, report, grad_norm
    counts = census.counts
    counts.recompilations = counters["stats"]["unique_graphs"] - graphs_before
    counts.graph_breaks = sum(counters["graph_break"].values())
    if ranks > 1 and config.training.parallel == "ddp":
        # DistributedDataParallel compares numbers when it is made, so it is left out: it adds up every gradient once.
        size = sum(4 * p.numel() for p in built.network.parameters() if p.requires_grad)
        counts.collectives["allreduce_ of gradients"] = 1, size
    return counts


@contextmanager
def ranks_of(config: RunConfig, ranks: int, device: torch.device) -> Iterator[World]:
    """This process as rank 0 of so many, whose collectives do nothing."""
    if ranks == 1 and config.training.parallel != "fsdp":
        yield World(0, 1, device)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, device, cpu_group=dist.new_group(backend="fake"))
    finally:
        dist.destroy_process_group()


class OneFakeMode(FakeTensorMode):
    """Whose tensors stay its own in a deep copy, as an average makes of a network."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OneFakeMode:
        return self


@contextmanager
def standing_in(config: RunConfig, world: World, info: DataInfo) -> Iterator[None]:
    """Fake tensors on the world's device, and what is built without data."""
    with ExitStack() as stack:
        if config.training.parallel == "fsdp":
            # Made before: a mesh looks for its own rank in a tensor of numbers.
            mesh = parallel.mesh_of(world, config.training.shard_group)
            stack.enter_context(mock.patch.object(state, "mesh_of", return_value=mesh))
        else:
            # Already there: fake weights cannot be moved.
            stack.enter_context(mock.patch.object(state, "place", return_value=None))
        stack.enter_context(mock.patch.object(state, "replicate", lambda network, _: network))
        stack.enter_context(mock.patch.object(state, "open_stream", return_value=None))
        stack.enter_context(mock.patch.object(state, "forward_flops", return_value=None))
        stack.enter_context(mock.patch.object(type(config.data), "describe", return_value=info))
        # Else the gradients' norm would be taken one by one, which real tensors are spared.
        together = [*_foreach_utils._foreach_supported_types, FakeTensor]
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", together))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(OneFakeMode())
        stack.enter_context(torch.device(world.device))
        yield


def row_of(counts: Counts) -> Row:
    """The numbers of a row of the table."""
    gathers = counts.collectives.get("_allgather_base_", (0, 0))
    scatters = counts.collectives.get("_reduce_scatter_base_", (0, 0))
    sums = [value for name, value in counts.collectives.items() if name.startswith("allreduce_")]
    return {
        "network_calls": counts.calls, "network_rows": counts.rows, "tflop": counts.products.flops / 1e12,
        "products": counts.products.kernels,
        "fused_kernels": counts.fused.kernels, "fused_gb": counts.fused.bytes / 1e9, "casts": counts.casts,
        "outside": counts.outside.kernels, "outside_gb": counts.outside.bytes / 1e9,
        "graphs": counts.graphs, "graph_breaks": counts.graph_breaks, "recompilations": counts.recompilations,
        "waits": len(counts.waits), "peak_gib": counts.peak_bytes / 2**30,
        "gathers": gathers[0], "gathered_gib": gathers[1] / 2**30,
        "scatters": scatters[0], "scattered_gib": scatters[1] / 2**30,
        "sums": sum(n for n, _ in sums), "summed_gib": sum(size for _, size in sums) / 2**30,
        "products_ms": 1000 * counts.products.bound_seconds, "fused_ms": 1000 * counts.fused.bound_seconds,
        "outside_ms": 1000 * counts.outside.bound_seconds, "bound_ms": 1000 * counts.bound_seconds,
        "share_of_peak": counts.products.flops / H100.flops / counts.bound_seconds,
    }  # fmt: skip


def table_of(rows: Sequence[Row]) -> str:
    """As Markdown: what a step does, and what it needs at least on an H100."""
    lines = [
        "| a step | TFLOP | products | fused kernels | outside | waits | peak, GiB | collectives, GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        fused = f"{row['fused_kernels']:,}: {row['fused_gb']:.1f} GB" if row["fused_kernels"] else "-"
        parts = [
            f"{row[f'{name}s']:,} {name}s {row[f'{done}_gib']:.2f}"
            for name, done in (("gather", "gathered"), ("scatter", "scattered"), ("sum", "summed"))
            if row[f"{name}s"]
        ]
        lines.append(
            f"| {row['name']} | {row['tflop']:.3g} | {row['products']:,} | {fused} | {row['outside']:,}: "
            f"{row['outside_gb']:.1f} GB | {row['waits']} | {row['peak_gib']:.2f} | {', '.join(parts) or '-'} |"
        )
    lines += ["", "| at least, ms | products | fused | outside | together | share of peak |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        times = " | ".join(f"{row[f'{part}_ms']:.3g}" for part in ("products", "fused", "outside", "bound"))
        lines.append(f"| {row['name']} | {times} | {100 * row['share_of_peak']:.0f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
