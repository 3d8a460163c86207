"""This library beside others that do the same work, in turns: training steps, sampling, loading.

    python benchmarks/peers.py --dit CHECKOUT --sit CHECKOUT                    # DiT-S/2 at 32x32x4, batch 4
    python benchmarks/peers.py --cfm CHECKOUT --rectified-flow CHECKOUT --compile
    python benchmarks/peers.py --shortcut-models CHECKOUT --python shortcut-models=JAX_VENV/bin/python \\
        --size 8 --channels 1 --width 64 --depth 4 --heads 4 --classes 1 --batch 64
    python benchmarks/peers.py --dit CHECKOUT --images FOLDER                   # loading too: a folder of class folders

A peer is a checkout of facebookresearch/DiT, willisma/SiT, atong01/conditional-flow-matching,
lucidrains/rectified-flow-pytorch or kvfrans/shortcut-models, as it was cloned; nothing of theirs is part of this
package. Each runs in a process of its own, with its own interpreter if its packages are not installed here; all others
wait while one works. Rounds go in turn, and the ratios are taken round by round: above 1 this library is faster. What
each does is in benchmarks/peer_worker.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.record import device_name, print_rows, write_result

PEERS = ("dit", "sit", "cfm", "rectified-flow", "shortcut-models")
OURS = "shortcutflow"
WORKER = Path(__file__).with_name("peer_worker.py")


class Worker:
    """A process that does one implementation's work when it is told to.

    Args:
        name: of the implementation.
        python: its interpreter.
        settings: what the worker is to build.

    Raises:
        RuntimeError: if it ends, with the last it said.
    """

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])}
        self._name = name
        self._process = subprocess.Popen(
            [python, str(WORKER), name, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        self.work: list[str] = self._answer()

    def seconds(self, work: str) -> float:
        """Wall seconds of one piece of work."""
        assert self._process.stdin is not None
        print(work, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}: see above")
        return json.loads(line)


class Round(NamedTuple):
    """Seconds of one piece of work, one after the other."""

    ours: float
    theirs: float


def compare(ours: Worker, peer: Worker, rounds: int) -> dict[str, list[Round]]:
    """By work that both can do, the seconds of each round; who is first changes from round to round."""
    seconds: dict[str, list[Round]] = {}
    for work in (work for work in peer.work if work in ours.work):
        for worker in (ours, peer):
            worker.seconds(work)  # compilation, and the first touch of memory
        seconds[work] = []
        for i in range(rounds):
            if i % 2:
                theirs = peer.seconds(work)
                seconds[work].append(Round(ours.seconds(work), theirs))
            else:
                seconds[work].append(Round(ours.seconds(work), peer.seconds(work)))
    return seconds


def row(peer: str, work: str, rounds: list[Round]) -> dict[str, Any]:
    """Medians, the fastest, and how many times faster this library is: of the median round and of the fastest."""
    ours, theirs = ([each[i] for each in rounds] for i in (0, 1))
    return {
        "name": f"{peer}, {work}", "ours_ms": 1000 * statistics.median(ours),
        "peer_ms": 1000 * statistics.median(theirs),
        "times_faster": statistics.median(theirs / ours for ours, theirs in rounds),
        "times_faster_at_best": min(theirs) / min(ours),
    }  # fmt: skip


def main() -> None:
    """Compare, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer; may be repeated"
    )
    parser.add_argument("--images", type=Path, help="a folder of class folders of pictures, for loading")
    numbers = {"size": 32, "channels": 4, "classes": 1000, "width": 384, "depth": 12, "heads": 6, "patch": 2}
    for name, value in (numbers | {"batch": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks, theirs too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results/")
    args = parser.parse_args()
    checkouts = {name: getattr(args, name.replace("-", "_")) for name in PEERS}
    checkouts = {name: path.resolve() for name, path in checkouts.items() if path is not None}
    if not checkouts:
        parser.error(f"give at least one checkout: {', '.join(f'--{name}' for name in PEERS)}")
    pythons = dict(each.split("=", 1) for each in args.python)
    settings = {name: getattr(args, name) for name in (*numbers, "batch", "compile", "threads", "device")}
    settings["images"] = None if args.images is None else str(args.images.resolve())
    device = torch.device(args.device)
    print(f"on {device_name(device)}, torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, checkout in checkouts.items():
        with ExitStack() as stack:
            ours = Worker(OURS, sys.executable, settings | {"checkout": str(WORKER.parents[1])})
            stack.callback(ours.close)
            peer = Worker(name, pythons.get(name, sys.executable), settings | {"checkout": str(checkout)})
            stack.callback(peer.close)
            found = [row(name, work, rounds) for work, rounds in compare(ours, peer, args.rounds).items()]
        print_rows(found)
        rows += found
    if args.write:
        config = {key: value for key, value in settings.items() if key != "images"} | {"rounds": args.rounds}
        print(write_result("peers", device, config, rows))


if __name__ == "__main__":
    main()
