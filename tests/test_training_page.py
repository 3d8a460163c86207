"""What docs/training.md says: its batch script runs, and it explains every metric."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from shortcutflow.train.loggers import read_metrics
from tests.test_benchmarks_training import measured

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node0\\nnode1\\n'; else echo "$@" > requeued; fi
"""
SRUN = """#!/bin/bash
echo "$@" > command
trap 'sleep 0.3; touch saved; exit 1' TERM
touch started
for i in $(seq 300); do sleep 0.1; if [ -f status ]; then exit $(cat status); fi; done
"""


@pytest.mark.parametrize(
    ("told", "status", "resumes"),
    [("to stop", 1, False), ("nothing", 0, False), ("nothing", 1, True)],
    ids=["stopped: requeued", "done: not", "failed: not, and it had resumed"],
)
def test_the_batch_script_requeues_what_was_stopped(tmp_path: Path, told: str, status: int, resumes: bool) -> None:
    """With stand-ins for srun and scontrol."""
    found = re.search(r"<!-- slurm script.*?```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    for name, text in (("job", found[1]), ("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    if resumes:
        (tmp_path / "config.json").touch()
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "RUN_DIR": "."}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "job"], cwd=tmp_path, env=environment)
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    if told == "to stop":
        time.sleep(0.3)  # until the script has set its trap
        job.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "status").write_text(str(status))
    assert job.wait(timeout=60) == status
    assert (tmp_path / "saved").exists() == (tmp_path / "requeued").exists() == (told == "to stop")
    command = (tmp_path / "command").read_text()
    assert "--nnodes 2 " in command
    assert "--rdzv-endpoint node0:20017 " in command, (
        "a port by the job's number, so that two jobs of a node never meet"
    )
    assert ("--resume" in command) == resumes


def test_every_metric_is_explained(tmp_path: Path) -> None:
    measured(tmp_path, nullcontext())
    names = {
        re.sub(r"=1_\d+", "=1_64", name) for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for name in line
    }
    page = PAGE.read_text()
    assert {"loss", "error_at/d=1_64", "grad_norm"} < names
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
