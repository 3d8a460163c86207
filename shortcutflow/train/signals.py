"""A signal stops a run: the loop saves, and ends with an exit status that means "try again later"."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h, "try again later": a scheduler can put the job back into its queue."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGINT is Ctrl-C."""
SETTLE_S = 1.0
"""Within this many seconds a signal of the same kind is the same request: a scheduler and the launcher both send it."""


class StoppedBySignal(SystemExit):
    """A run has stopped at a signal, and everything is saved. Its exit status is 75.

    Args:
        name: the signal, for example "SIGTERM".
        checkpoint: that was saved.
        step: optimizer steps done.
    """

    def __init__(self, name: str, checkpoint: Path, step: int) -> None:
        super().__init__(STOPPED_EXIT_CODE)
        self.message = (
            f"stopped by {name}: {checkpoint} holds everything; the same command with --resume goes on from step {step}"
        )

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Turns the first SIGTERM, SIGUSR1 or Ctrl-C into a request that the loop reads, for as long as the block lasts.

    A second one of the same kind, more than SETTLE_S seconds after the first, ends the process at once: by then the
    signal has its default action again, which works even where saving is stuck in a system call. A request that was
    not read by the end of the block goes to the handlers that were there before.

    Signals reach only the main thread of Python: in any other the block does nothing, and a warning says so.
    """

    def __init__(self) -> None:
        self._arrived: dict[int, float] = {}  # signal -> monotonic seconds, in order of arrival
        self._defaulted: set[int] = set()
        self._before: dict[int, Any] = {}
        self._was_read = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        else:
            logger.warning("not in the main thread: a signal will end this run without saving it")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: the handler was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self._arrived and not self._was_read:
            os.kill(os.getpid(), next(iter(self._arrived)))

    @property
    def requested(self) -> str | None:
        """The name of the first signal that came, or None.

        Read it in the main thread. Once a signal has come the first reading takes until SETTLE_S seconds after it:
        repetitions that are no second request have arrived by then, and the signal gets its default action.
        """
        if not self._arrived:
            return None
        self._was_read = True
        for number, at in list(self._arrived.items()):
            if number not in self._defaulted:
                time.sleep(max(0.0, at + SETTLE_S - time.monotonic()))
                signal.signal(number, signal.SIG_DFL)
                self._defaulted.add(number)
        return signal.Signals(next(iter(self._arrived))).name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._arrived.setdefault(number, now) > SETTLE_S:
            # The loop has not read the first one: it hangs in Python code.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
