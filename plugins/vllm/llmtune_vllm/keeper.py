"""Runs a command for another process, and ends it with all that it has started when that process is gone.

A process that is killed cannot clean up after itself, so this one watches. It is started as a file, by the standard
library alone: keeper.py PARENT COMMAND...
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

LOOKS_S = 0.2
TERM_S, KILL_S = 15.0, 5.0
"""Seconds that the command has to end by itself, and to be gone once it was killed."""


def main(parent: int, command: list[str]) -> int:
    """The exit code of the command."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    child = subprocess.Popen(command, start_new_session=True)
    while child.poll() is None and not asked and os.getppid() == parent:
        time.sleep(LOOKS_S)
    for number, patience in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        until = time.monotonic() + patience
        while signalled(child.pid, number) and time.monotonic() < until:
            child.poll()  # lets its entry go
            time.sleep(LOOKS_S)
            number = 0
    return child.wait()


def signalled(group: int, number: int) -> bool:
    """Whether there was still a process of the group to send the signal to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
