"""A signal stops a run after its step with status 75; a second one ends it at once; handlers are put back."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shortcutflow.train import signals
from shortcutflow.train.signals import STOPPED_EXIT_CODE, StoppedBySignal, StopRequest

# The package without its __init__, which would load torch: these processes start in no time, and so could any launcher.
LIGHT = f"""
import sys, time, types
from pathlib import Path
package = types.ModuleType("shortcutflow")
package.__path__ = [{str(Path(signals.__file__).parents[1])!r}]
sys.modules["shortcutflow"] = package
from shortcutflow.train.signals import StopRequest, StoppedBySignal
assert "torch" not in sys.modules
"""
LOOP = """
with StopRequest() as stop:
    for step in range(2000):
        if step == 1:
            print("ready", flush=True)
        time.sleep(0.01)
        if stop.requested:
            print("saving", flush=True)
            {save}
            raise StoppedBySignal(stop.requested, Path("runs/a/step_7"), 7)
print("not stopped", flush=True)
"""


class Run:
    """A process that says "ready"; killed at the end if it still runs."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LIGHT + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Run:
        self.expect("ready")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"{word}\n", line or self.process.stderr.read()  # type: ignore[union-attr]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ends_with(self) -> int:
        return self.process.wait(timeout=10)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_loop_saves_and_ends_with_75(name: str) -> None:
    with Run(LOOP.format(save="")) as run:
        run.send(signal.Signals[name])
        run.expect("saving")
        assert run.ends_with() == STOPPED_EXIT_CODE == 75


def test_negative_control_without_a_handler() -> None:
    """The same loop whose requests go nowhere dies of the signal, so status 75 above is the handler's work."""
    nobody = "__import__('contextlib').nullcontext(types.SimpleNamespace(requested=None))"
    with Run(LOOP.format(save="").replace("StopRequest()", nobody)) as run:
        run.send(signal.SIGTERM)
        assert run.ends_with() == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_second_signal_ends_a_stuck_save(name: str) -> None:
    """Summing never comes back to the interpreter, so no Python handler runs; only the default action works."""
    with Run(LOOP.format(save="sum(range(10**13))")) as run:
        run.send(signal.Signals[name])
        run.expect("saving")
        time.sleep(0.1)
        start = time.monotonic()
        run.send(signal.Signals[name])
        assert run.ends_with() == -signal.Signals[name]
        assert time.monotonic() - start < 2


def test_second_signal_ends_a_loop_that_never_reads() -> None:
    stuck = "with StopRequest():\n    print('ready', flush=True)\n    while True: time.sleep(0.01)"
    with Run(stuck) as run:
        run.send(signal.SIGTERM)
        time.sleep(signals.SETTLE_S + 0.2)
        assert run.process.poll() is None
        run.send(signal.SIGTERM)
        assert run.ends_with() == -signal.SIGTERM


def test_repetition_within_a_moment_is_one_request() -> None:
    """Scheduler and launcher both pass the signal on, milliseconds apart."""
    with Run(LOOP.format(save="time.sleep(0.5)")) as run:
        for _ in range(3):
            run.send(signal.SIGTERM)
            time.sleep(0.1)
        run.expect("saving")
        assert run.ends_with() == STOPPED_EXIT_CODE


def test_another_kind_does_not_end_the_save() -> None:
    """A scheduler's early SIGUSR1 is followed by its SIGTERM; the first one gives the name."""
    with Run(LOOP.format(save="time.sleep(0.5); print(stop.requested, flush=True)")) as run:
        run.send(signal.SIGUSR1)
        run.expect("saving")
        run.send(signal.SIGTERM)
        run.expect("SIGUSR1")
        assert run.ends_with() == STOPPED_EXIT_CODE


def test_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SETTLE_S", 0.0)
    heard: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    mine = signal.getsignal(signal.SIGUSR1)
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGUSR1) is not mine
            assert stop.requested is None
            signal.raise_signal(signal.SIGUSR1)
            assert stop.requested == "SIGUSR1"
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert heard == []
        with pytest.raises(KeyError), StopRequest():
            raise KeyError
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_unread_request_reaches_the_old_handler() -> None:
    """A signal after the loop's last look is not lost: it ends the evaluation that follows."""
    heard: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with StopRequest():
            signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_other_thread_says_so(caplog: pytest.LogCaptureFixture) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def use() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert seen == [(before, None)]
    assert "not in the main thread" in caplog.text


def test_message_names_the_checkpoint() -> None:
    stopped = StoppedBySignal("SIGINT", Path("runs/a/step_7"), 7)
    assert "runs/a/step_7 holds everything" in str(stopped)
    assert "--resume goes on from step 7" in str(stopped)
    assert stopped.code == STOPPED_EXIT_CODE
