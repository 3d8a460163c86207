"""Everything that a GPU is needed for, in one command: tests, speed, memory, and a U-Net trained on CIFAR-10.

    make gpu ARGS='--cifar data/cifar10-train.parquet'  # on one H100; at most 25 minutes
    python benchmarks/gpu.py --minutes 9                # as much as fits; the next call goes on from there
    python benchmarks/gpu.py --only parity sampling     # some parts
    python benchmarks/gpu.py --toy --results FOLDER     # the same parts on a CPU, tiny: the numbers mean nothing

Each part runs in a process of its own and for a limited time. After each, everything measured so far is written to
``benchmarks/results/gpu_DEVICE.json``, with the device, the versions and the commit. A part that stands there already,
of the same device, versions and code, is not run again; one that failed is, after the new ones.

Exit status: 0 when every part that was asked for is there; 1 when one failed or the time did not suffice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: a plain install has no benchmarks

from benchmarks.gpu_parts import PARTS, Call, Part
from benchmarks.recipe_run import ROOT
from benchmarks.record import RESULTS, described, print_rows
from shortcutflow.io.atomic import write_whole

CODE = ("shortcutflow", "backbones", "recipes", "benchmarks", "tests/parity", "tests/backbones_contract")
"""Folders on which the numbers depend."""


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are missing; the exit status."""
    args = parsed(argv)
    if args.here:
        rows = PARTS[args.here].run(
            Call(args.device, args.seconds, args.results.resolve(), args.scratch.resolve(), args.cifar)
        )
        args.into.write_text(json.dumps(rows))
        return 0
    device = torch.device(args.device)
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()) if device.type == "cuda" else "cpu"
    path = args.results / f"gpu_{name}.json"
    result = Result(path, {**described(device), "code": code_digest(), "toy": args.toy}, commit_name())
    deadline = time.monotonic() + 60 * args.minutes
    wanted = args.only or list(PARTS)
    # sorted() keeps their order otherwise.
    for part in sorted((part for part in wanted if not result.has(part)), key=result.failed):
        left = deadline - time.monotonic()
        if left < 60 * PARTS[part].least:
            print(f"{part}: {left:.0f} s are left, too few to begin it", flush=True)
            continue
        print(f"{part} ...", flush=True)
        begin = time.monotonic()
        try:
            rows = run_part(part, PARTS[part], left, args)
        except OutOfTime:
            print("  cut off: the next call begins it again", flush=True)
        except RuntimeError as error:
            result.add(part, {"seconds": time.monotonic() - begin, "error": str(error)})
            print(f"  failed: {error}", flush=True)
        else:
            result.add(part, {"seconds": time.monotonic() - begin, "rows": rows})
            print_rows(rows)
    missing = [part for part in wanted if not result.has(part)]
    print(f"{path}: {len(wanted) - len(missing)} of {len(wanted)} parts")
    if missing:
        print(f"missing: {', '.join(missing)}")
    return 1 if missing else 0


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: for options that do not fit, or without a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="for everything")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cifar", type=Path, help="pictures of CIFAR-10: a folder, an archive or a parquet file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "gpu", help="folder of unfinished work")
    parser.add_argument("--toy", action="store_true", help="everything tiny, on a CPU")
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = "cpu" if args.toy else "cuda"
    if not args.toy and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; --toy runs the same parts, tiny, on a CPU")
    if args.toy and args.results == RESULTS:
        parser.error("numbers of --toy mean nothing and do not belong among the results: give --results FOLDER")
    if args.cifar is not None and not args.cifar.exists():
        parser.error(f"--cifar {args.cifar} does not exist")
    return args


class OutOfTime(Exception):
    """The time for everything ended within a part."""


def run_part(name: str, part: Part, left: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a part that runs in a process of its own, with ``left`` seconds for everything.

    Raises:
        RuntimeError: if it fails or takes longer than it may, with the end of what it printed.
        OutOfTime: if the time for everything ended first.
    """
    # What is tiny takes as long as compilers take, which on a busy CPU is anything.
    seconds = left if args.toy else min(60 * part.minutes, left)
    with tempfile.TemporaryDirectory() as folder:
        into, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", name, "--into", str(into)]
        command += ["--seconds", str(seconds), "--results", str(args.results.resolve())]
        command += ["--scratch", str(args.scratch.resolve()), *["--toy"] * args.toy]
        command += [] if args.cifar is None else ["--cifar", str(args.cifar.resolve())]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                if seconds == left:
                    raise OutOfTime from None
                raise RuntimeError(f"not done in {part.minutes:g} minutes:\n{log.read_text()[-3000:]}") from None
            finally:
                # Its own children too, such as data workers; the group is empty where it ended by itself.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            raise RuntimeError(f"ended with status {status}:\n{log.read_text()[-3000:]}")
        rows: list[dict[str, Any]] = json.loads(into.read_text())
        return rows


class Result:
    """The parts measured so far, in a file that is written anew after each.

    Args:
        path: of the file; parts in it that were made by another device, other versions or other code are dropped.
        made_by: device, versions and code.
        commit: for the reader.
    """

    def __init__(self, path: Path, made_by: dict[str, Any], commit: str) -> None:
        self._path, self._head = path, {"benchmark": "gpu", "commit": commit, **made_by}
        before = json.loads(path.read_text()) if path.exists() else {}
        same = all(before.get(key) == value for key, value in made_by.items())
        self._parts: dict[str, dict[str, Any]] = before["parts"] if same else {}

    def has(self, part: str) -> bool:
        """Whether a part was measured."""
        return "rows" in self._parts.get(part, {})

    def failed(self, part: str) -> bool:
        """Whether a part was tried and failed."""
        return "error" in self._parts.get(part, {})

    def add(self, part: str, found: dict[str, Any]) -> None:
        """Keep a part's rows, or its error."""
        self._parts[part] = {"date": time.strftime("%Y-%m-%d"), **found}
        ordered = {name: self._parts[name] for name in PARTS if name in self._parts}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self._head | {"parts": ordered}, indent=2) + "\n")


def code_digest() -> str:
    """Of all files on which the numbers depend: other than a commit, it is the same once a result is committed."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit_name() -> str:
    """Of the checkout, and whether files differ from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
