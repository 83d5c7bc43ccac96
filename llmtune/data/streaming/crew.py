"""Processes that tokenise while the model trains."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any

from llmtune.contract.errors import DataError

_MOST = 8
_LAST_WORDS_S = 5.0


def processors() -> int:
    """Processes that a rank starts where the recipe does not say: its share of the machine's processors."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(_MOST, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class WorkerPool:
    """`work` done by `count` processes, which are forked at once; in a thread where the system cannot fork.

    Start it before a process group is joined: a fork holds its sockets open, so that others would not notice when this
    rank dies. The processes end when they are told to, or when this one is gone, however it ended.
    """

    def __init__(self, work: Callable[[Any], Any], count: int) -> None:
        self._work = work
        self._lines: SimpleQueue[Connection] = SimpleQueue()
        self._forked = "fork" in multiprocessing.get_all_start_methods()
        ends, processes = _fork(work, count) if self._forked else ([], [])
        for end in ends:
            self._lines.put(end)
        # A thread waits on behalf of each process.
        self._threads = ThreadPoolExecutor(count if self._forked else 1, "llmtune-stream")
        self._finish = Finalize(self, _finish, (ends, processes), exitpriority=20)

    def submit(self, item: Any) -> Future[Any]:
        """The result of `work(item)`, once it is there; or the error that it raised."""
        return self._threads.submit(self._do if self._forked else self._work, item)

    def close(self) -> None:
        """Let work in hand end, drop what waits, and end the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._finish()

    def _do(self, item: Any) -> Any:
        line = self._lines.get()
        try:
            line.send(item)
            done, result = line.recv()
        except (EOFError, OSError):
            raise DataError(
                "preprocessing_num_workers: a process that tokenises died, as when memory runs out; set fewer, or a "
                "smaller buffer_size"
            ) from None
        finally:
            self._lines.put(line)
        if not done:
            raise result
        return result


def _fork(work: Callable[[Any], Any], count: int) -> tuple[list[Connection], list[Any]]:
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=_serve, args=(work, number, pairs), daemon=True) for number in range(count)]
    for process in processes:
        process.start()
    for _, theirs in pairs:
        theirs.close()
    return [ours for ours, _ in pairs], processes


def _serve(work: Callable[[Any], Any], number: int, pairs: Sequence[tuple[Connection, Connection]]) -> None:
    """In a process: work until nobody is left to work for."""
    # Whoever stops a run tells all its processes; what is asked to save first still needs its data.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    # One thread a process: tokenizers would start as many again, and warns of forking after its threads were used.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for at, (ours, theirs) in enumerate(pairs):
        ours.close()  # else this process would keep its own line open when the other end has died
        if at != number:
            theirs.close()
    line = pairs[number][1]
    while True:
        try:
            item = line.recv()
        except (EOFError, OSError):
            return
        try:
            answer = pickle.dumps((True, work(item)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # whatever it is, it is raised where the result is waited for
            answer = pickle.dumps((False, _portable(error)))
        try:
            line.send_bytes(answer)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _finish(ends: Sequence[Connection], processes: Sequence[Any]) -> None:
    for end in ends:
        end.close()
    for process in processes:
        process.join(_LAST_WORDS_S)
        if process.is_alive():
            process.kill()
            process.join()
