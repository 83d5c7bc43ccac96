"""A process that is asked to stop, by SIGTERM as schedulers send it, or by Ctrl-C; and workers that end with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 75
"""Stopped on request, with all saved that there was; a scheduler may run the same command again (EX_TEMPFAIL)."""
_PATIENCE_S = 10.0
"""How long a process may take to come to its end once SIGTERM has asked for it and nothing has to be saved."""
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop where nothing had to be saved first. Not an Exception: nobody handles it on the way."""


class StopRequest:
    """Makes of the first SIGTERM or Ctrl-C a request, while it is entered, and of a second Ctrl-C an order.

    Where nothing has to be saved, a request raises `Stopped` at once. Within `finishing`, it is acknowledged in the
    terminal and sets `asked`; whoever works there looks at it and comes to an end in good order. A second Ctrl-C raises
    KeyboardInterrupt and sets `ordered`, whatever becomes of the exception on its way.
    """

    def __init__(self, doing: str = "before anything was learnt") -> None:
        self.doing = doing
        """What a request interrupts where nothing has to be saved, as the end of a sentence."""
        self.asked = False
        self.ordered = False
        self._finishing: list[Callable[[], str]] = []
        self._before: dict[int, Any] = {}
        self._deadline: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._deadline is not None:
            self._deadline.cancel()

    @contextmanager
    def finishing(self, what: Callable[[], str]) -> Iterator[None]:
        """Within, a request only sets `asked`. `what` says what is still done: `finishing step 7, then saving`."""
        self._finishing.append(what)
        try:
            yield
        finally:
            self._finishing.pop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again and number == signal.SIGINT:
            self.ordered = True
            raise KeyboardInterrupt
        if again:
            return
        if not self._finishing:
            if number == signal.SIGTERM:  # what is interrupted may hang, as a pool of processes that was just starting
                self._deadline = threading.Timer(_PATIENCE_S, os._exit, (EXIT_INTERRUPTED,))
                self._deadline.daemon = True
                self._deadline.start()
            raise Stopped(f"stopped {self.doing}; run the same command again to continue")
        _say(f"{self._finishing[-1]()}; Ctrl-C again to stop now")


def _say(sentence: str) -> None:
    """One line on standard error, by the first rank of a machine. Python's own streams may be locked by what a signal
    has interrupted."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\nllmtune: {sentence}\n".encode())


def end_children() -> None:
    """End the processes that this one has forked and not waited for: the interpreter would wait for them at its end."""
    for child in multiprocessing.active_children():
        child.kill()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when the thread that started it ends, however it ends (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it has ended in between
        os.kill(os.getpid(), number)
