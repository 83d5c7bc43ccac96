"""Work spread over processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from llmtune.contract.errors import DataError
from llmtune.distributed.stopping import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALONE = 2
"""Items that are done here unless processes are asked for: starting them takes longer."""
_MOST = 32
_work: Callable[[Any], Any] | None = None  # in a worker: what it does with each item


def in_order(work: Callable[[Item], Result], items: Iterator[Item], workers: int | None = None) -> Iterator[Result]:
    """`work` of each item, in the order of `items`, by `workers` processes (absent: one for each processor).

    `work` is inherited by forking, so it need not be picklable; items and results must be. Where the system cannot
    fork, all is done here.
    """
    first = list(islice(items, _ALONE + 1))
    items = chain(first, items)
    count = workers or min(_MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    few = workers is None and len(first) <= _ALONE
    if count == 1 or few or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, items)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (work,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_do, item))
                if len(waiting) > 2 * count:  # enough to keep all busy, little enough to hold
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "preprocessing_num_workers: a process that tokenises died, as when memory runs out; "
                f"set fewer than {count}, or a smaller preprocessing_batch_size"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def progress(what: str, unit: str) -> Any:
    """A progress bar of tqdm's on a terminal, for what takes longer than two seconds; elsewhere nothing is written."""
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, unit_scale=True, delay=2, disable=None, leave=False)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Whoever stops a run tells all its processes, and this one does as the first one says.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    die_with_parent()
    # One thread a process: tokenizers would start as many again, and warns of forking after its threads were used.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
