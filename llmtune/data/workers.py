"""Work spread over processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from llmtune.contract.errors import DataError
from llmtune.distributed.stopping import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALONE = 2
"""Items that are done here unless processes are asked for: starting them takes longer."""
_MOST = 32
_MOST_A_RANK = 8
_work: Callable[[Any], Any] | None = None  # in a worker: what it does with each item


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def rank_workers() -> int:
    """Processes that each rank starts where the recipe does not say: its share of the machine's processors."""
    return max(1, min(_MOST_A_RANK, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class WorkerPool:
    """`count` processes that do `work`; where the system cannot fork, this one does it.

    They are forked at once, so that `work` need not be picklable; items and results must be. Start a pool before a
    process group is joined: a fork holds its sockets open, so that others would not notice when this rank dies. The
    processes end with `close`, or when this one is gone, however it ended.
    """

    def __init__(self, work: Callable[[Any], Any], count: int) -> None:
        self._work, self.count = work, count
        self._pool: ProcessPoolExecutor | None = None
        if "fork" in multiprocessing.get_all_start_methods():
            self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (work,))
            self._pool.submit(os.getpid).result()

    def in_order(self, items: Iterator[Any]) -> Iterator[Any]:
        """`work` of each item, in the order of `items`, a few ahead of what is asked for. What `items` or `work` raises
        is raised in its turn."""
        if self._pool is None:
            yield from map(self._work, items)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            with self._unbroken():
                for future in self._submitted(self._pool, items):
                    waiting.append(future)
                    if len(waiting) > 2 * self.count:  # enough to keep all busy, little enough to hold
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def begin(self, item: Any) -> Callable[[], Any]:
        """Begin the `work` of an item beside those that are in order. Calling gives its result, or raises what it
        raised, as often as it is asked."""
        if self._pool is None:
            return partial(self._work, item)
        with self._unbroken():
            future = self._pool.submit(_do, item)

        def result() -> Any:
            with self._unbroken():
                return future.result()

        return result

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise DataError(
                "preprocessing_num_workers: a process that prepares data died, as when memory runs out; "
                f"set fewer than {self.count}, or a smaller preprocessing_batch_size or buffer_size; where rows show "
                "media, a smaller image_max_pixels or video_maxlen"
            ) from None

    def _submitted(self, pool: ProcessPoolExecutor, items: Iterator[Any]) -> Iterator[Future[Any]]:
        try:
            for item in items:
                yield pool.submit(_do, item)
        except Exception as error:  # raised in its turn, after the results of the items before it
            failed: Future[Any] = Future()
            failed.set_exception(error)
            yield failed

    def close(self) -> None:
        """End the processes once they are done with the items they have."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Ahead:
    """The items of an endless iterator, of which a thread makes the next ones while others are used."""

    def __init__(self, items: Iterator[Any], count: int = 1) -> None:
        self._items, self._thread = items, ThreadPoolExecutor(1, "llmtune-ahead")
        self._made = deque(self._thread.submit(next, items) for _ in range(count))

    def next(self) -> Any:
        """The next item. Raises what making it raised, each time it is asked for."""
        item = self._made[0].result()
        self._made.popleft()
        self._made.append(self._thread.submit(next, self._items))
        return item

    def close(self) -> None:
        """Make no more items."""
        self._thread.shutdown(cancel_futures=True)


def in_order(work: Callable[[Item], Result], items: Iterator[Item], workers: int | None = None) -> Iterator[Result]:
    """`work` of each item, in the order of `items`, by `workers` processes (absent: one for each processor)."""
    first = list(islice(items, _ALONE + 1))
    items = chain(first, items)
    count = workers or min(_MOST, processors())
    if count == 1 or (workers is None and len(first) <= _ALONE):
        yield from map(work, items)
        return
    pool = WorkerPool(work, count)
    try:
        yield from pool.in_order(items)
    finally:
        pool.close()


def progress(what: str, unit: str, *, shown: bool = True) -> Any:
    """A progress bar of tqdm's on a terminal, for what takes longer than two seconds; elsewhere, or unless it is to be
    `shown`, nothing is written."""
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, unit_scale=True, delay=2, disable=None if shown else True, leave=False)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Whoever stops a run tells all its processes; what is asked to save first still needs its data.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    die_with_parent()
    # One thread a process: tokenizers would start as many again, and warns of forking after its threads were used.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(item: Any) -> Any:
    assert _work is not None
    try:
        return _work(item)
    except Exception as error:
        raise _portable(error) from None


def _portable(error: Exception) -> Exception:
    """The error, or what it says where it cannot travel between processes: the pool would break on it."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
