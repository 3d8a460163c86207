"""Kills a run again and again, and in the end lets it finish.

Each life is a fork of this process, which has loaded everything, so that a life costs a tenth of a second to begin.
Prints the step that was last logged at each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from shortcutflow import checkpoint
from shortcutflow.config import RunConfig
from shortcutflow.train.loggers import read_metrics
from shortcutflow.train.loop import train


def live(run_dir: Path) -> int:
    """Begin or continue the run in a process of its own; gives its number."""
    child = os.fork()
    if child:
        return child
    try:
        # PyTorch makes its thread pool anew after a fork, which must not happen in two threads at once: so here.
        torch.set_num_threads(1)
        train(RunConfig.load(run_dir), run_dir, resume=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def last_step(run_dir: Path) -> int:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill_later(child: int, run_dir: Path, moments: random.Random) -> bool:
    """Kill a life some steps after its beginning, 0 to 3, and up to 0.05 seconds; says whether it was still there."""
    saved = checkpoint.latest_in(run_dir / "checkpoints")
    target = (saved.step if saved is not None else 0) + moments.randint(0, 3)
    until = time.monotonic() + 60
    # A life first removes the lines beyond its checkpoint, so those of the life before count for a moment: no matter.
    while last_step(run_dir) < target and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < until, "the run makes no steps"
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main(run_dir: Path, kills: int) -> None:
    """As the module says."""
    moments = random.Random(0)
    for _ in range(kills):
        if kill_later(live(run_dir), run_dir, moments):
            print(last_step(run_dir), flush=True)
    _, status = os.waitpid(live(run_dir), 0)
    sys.exit(os.waitstatus_to_exitcode(status))
