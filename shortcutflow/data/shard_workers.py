"""Writing shards in several processes: none outlives the call, whatever ends it, and Ctrl-C ends it at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tqdm import tqdm

from shortcutflow.data.shards import EncodedBatch, EncodedSample, Skipped, WrittenShard, write_shard

Work = TypeVar("Work")
Encoded = EncodedSample | EncodedBatch | Skipped
Encode = Callable[[Work], Iterable[Encoded]]
POLL_SECONDS = 0.2


class Stopped(Exception):
    """Another shard has failed, or the user has interrupted."""


class WorkerDiedError(RuntimeError):
    """A worker process ended without a word."""


class ShardTask(NamedTuple, Generic[Work]):
    """One shard to write: its path, what is encoded into it, and how many items that is."""

    path: Path
    work: Work
    items: int


def write_tasks(
    tasks: Sequence[ShardTask[Work]], encode: Encode[Work], *, workers: int, done: int = 0, progress: bool = True
) -> list[WrittenShard]:
    """Write shards; gives them in the order of their tasks.

    Args:
        tasks: to write.
        encode: makes the samples of a shard; it must be possible to pickle it, unless there is one worker.
        workers: processes; with 1 the work is done in this one.
        done: items of shards that were there before, for the progress bar.
        progress: show a bar on standard error.

    Raises:
        WorkerDiedError: if a process was killed, such as for want of memory.
        Exception: whatever ``encode`` raised first; no shard is left half written.
    """
    if not tasks:
        return []
    total = done + sum(task.items for task in tasks)
    # On a terminal it moves; in a log file a line now and then is enough.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total,
        initial=done,
        unit="img",
        desc="shards",
        mininterval=interval,
        maxinterval=interval,
        disable=not progress,
    ) as bar:
        if workers == 1:
            return [write_shard(task.path, _counted(encode(task.work), bar.update)) for task in tasks]
        return _in_processes(tasks, encode, min(workers, len(tasks)), bar, done)


def _counted(samples: Iterable[Encoded], count: Callable[[int], object]) -> Iterator[Encoded]:
    for sample in samples:
        yield sample
        count(len(sample.names) if isinstance(sample, EncodedBatch) else 1)


def _in_processes(
    tasks: Sequence[ShardTask[Work]], encode: Encode[Work], workers: int, bar: tqdm, done: int
) -> list[WrittenShard]:
    # Never "fork": a lock that another thread of this process holds would stay locked for ever in the child.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])
    counter, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(encode, counter, stop)
    ) as pool:
        try:
            futures = [pool.submit(_write, task.path, task.work) for task in tasks]
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                bar.update(done + counter.value - bar.n)
                for future in finished:
                    future.result()
        except BaseException as error:
            stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerDiedError(
                    "a worker process died, perhaps for want of memory: the same command continues, with fewer "
                    "--workers it needs less (a script that calls this needs `if __name__ == '__main__':`)"
                ) from error
            raise
    return [future.result() for future in futures]


_encode: Encode[Any]
_count: Callable[[int], object]


def _begin_worker(encode: Encode[Any], counter: Any, stop: Any) -> None:
    """Set up a worker process."""
    global _encode, _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def count(items: int) -> None:
        if stop.value:
            raise Stopped
        with counter.get_lock():
            counter.value += items

    _encode, _count = encode, count


def _die_with_parent() -> None:
    """End this process when the main one is gone: nobody is left to use what it writes, or to stop it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _write(path: Path, work: Any) -> WrittenShard:
    return write_shard(path, _counted(_encode(work), _count))
