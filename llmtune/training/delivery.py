"""Calls of a plugin's logger, made beside the training: a tracker whose server hangs holds up nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

HANGS_S = 600.0
"""After so many seconds in one call a logger counts as lost."""
PATIENCE_S = 60.0
"""So many seconds, at the end of a run, all loggers together have to deliver what is left."""


class Delivery:
    """The calls of one logger, in order, in a thread of its own, which ends with the process whatever it waits for."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self._calls: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._lost = False
        self._since: float | None = None
        self._thread = Thread(target=self._work, name=f"logger {type(logger).__name__}", daemon=True)
        self._thread.start()

    def call(self, made: Callable[[Any], None]) -> None:
        """Have the logger called as soon as its earlier calls are done. What it raises is said once, and it is then
        called no more."""
        since = self._since
        if since is not None and time.monotonic() - since > HANGS_S:
            self._lose(f"it has not answered for {HANGS_S:.0f} s")
        if not self._lost:
            self._calls.put(made)

    def close(self) -> None:
        """Make no more calls."""
        self._calls.put(None)

    def wait(self, seconds: float) -> None:
        """Wait at most so long for what was closed."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._lose("it has not delivered all at the end of the run")

    def _work(self) -> None:
        while (made := self._calls.get()) is not None:
            if self._lost:
                continue
            self._since = time.monotonic()
            try:
                made(self.logger)
            except Exception as error:
                self._lose(f"{type(error).__name__}: {error}")
            except SystemExit as error:  # in a thread it would end the thread alone, and unsaid
                self._lose(f"it asked the process to exit ({error})")
            finally:
                self._since = None

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            complain(f"logger {type(self.logger).__name__}", why)


def wait_for_all(deliveries: Sequence[Delivery]) -> None:
    """Close all of them and wait, for all together no longer than `PATIENCE_S`."""
    for delivery in deliveries:
        delivery.close()
    until = time.monotonic() + PATIENCE_S
    for delivery in deliveries:
        delivery.wait(max(0.0, until - time.monotonic()))


def complain(what: str, why: str) -> None:
    """Say that something is off for the rest of the run."""
    print(f"llmtune: {what} failed and is off for the rest of the run: {why}", file=sys.stderr)
